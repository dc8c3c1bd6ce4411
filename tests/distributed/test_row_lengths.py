"""ln w does not depend on the row: alone, padded or packed, in rows of 16 and of 2,048 tokens."""

import random
from dataclasses import replace

import torch

from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.records import TrainingSequence
from megatron_jq.train.passes import BatchOptions, score
from tests.distributed import reference
from tests.distributed.cases import SMALL, build_options
from tests.distributed.ranks import run_ranks
from tests.distributed.shards import load_whole

LONG = replace(SMALL, max_position_embeddings=2048)
ROWS = {
    16: {
        "one by one": BatchOptions(1),
        "padded to 16": BatchOptions(1, sequence_multiple=16),
        "rows of 16": BatchOptions(1, max_tokens=16),
    },
    2048: {
        "one by one": BatchOptions(1),
        "padded to 2048": BatchOptions(1, sequence_multiple=2048),
        "rows of 2048": BatchOptions(1, max_tokens=2048),
        "all in one row": BatchOptions(100),
    },
}


def _sequences(row: int) -> list[TrainingSequence]:
    """Lengths from a third of the row to the whole of it, so that rows hold one, two or three of them."""
    rng = random.Random(row)

    def ids(count):
        return tuple(rng.randrange(70) for _ in range(count))

    lengths = [row, row // 2, row // 2, row // 3, row // 3 - 1, row // 3 - 1]
    return [TrainingSequence(0, m, ids(n - 4), ids(2), 2, ids(2)) for m, n in enumerate(lengths)]


def _log_w(runtime, row: int):
    options = build_options(LONG, head_chunk_tokens=None)
    policies = build_policies(LONG, options, runtime)
    load_whole(policies[0], runtime, reference.noisy_weights(LONG))
    model, sequences = wrap_for_training(policies, options, runtime), _sequences(row)
    return {
        name: score(model, sequences, (1, len(sequences)), runtime, batch).table.log_w_BM
        for name, batch in ROWS[row].items()
    }


def test_padding_and_packing_change_no_log_w_beyond_rounding():
    for row in ROWS:
        [found] = run_ranks(_log_w, row)
        alone = found["one by one"]
        assert torch.isfinite(alone).all()
        for name, log_w in found.items():
            assert (log_w - alone).abs().max() < 2e-5, (row, name, (log_w - alone).abs().max())
