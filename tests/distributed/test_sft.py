"""SFT and pretraining against plain cross-entropy on the unsharded model: torch's own loss with the prompt masked, and
Megatron's own files read by IndexedDataset. In float64, at tensor-, pipeline- and data-parallel layouts.
"""

import itertools
import math
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_jq.corpus import reading
from megatron_jq.corpus.files import open_files
from megatron_jq.corpus.reading import CorpusOptions, open_corpus
from megatron_jq.data.sampler import InOrder
from megatron_jq.errors import UserError
from megatron_jq.model.rows import pack_sequences
from megatron_jq.objective.table import StepTable
from megatron_jq.records import Example, TrainingSequence
from megatron_jq.rollout.engine import SamplingOptions, requests_of_replica
from megatron_jq.rollout.given import GivenRationales
from megatron_jq.train import rollouts
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.passes import BatchOptions
from megatron_jq.train.pretraining import Batch, scored_tokens
from tests.distributed import reference
from tests.distributed.cases import POLICIES, SMALL, build, build_options, train_with
from tests.distributed.ranks import run_apart, run_ranks
from tests.distributed.shards import join, named_tensors

TOLERANCE = 1e-10
LAYOUTS = {"TP2": {"tp": 2}, "PP2": {"pp": 2}, "DP2": {"dp": 2}, "TP2 PP2 DP2": {"tp": 2, "pp": 2, "dp": 2}}
BATCHES = [BatchOptions(micro_batch_size=2), BatchOptions(micro_batch_size=1, max_tokens=40)]
SAMPLING = SamplingOptions(0, 0, 1.0, 1.0, close_id=1, eos_id=2, seed=0, step=0)
SEQ_LENGTH = 12


def examples() -> list[Example]:
    """Five, an odd number for two replicas: ragged, two with a bridge, one whose rationale is the close token alone."""
    rng = random.Random(11)

    def ids(low, high):
        return tuple(rng.randrange(SMALL.vocab_size) for _ in range(rng.randint(low, high)))

    return [
        Example(i, "", "", ids(2, 6), ids(1, 4), (), (5, 6) if i < 2 else (), (*ids(0, 7 * (i > 0)), 1))
        for i in range(5)
    ]


def sequences_of(batch: list[Example], replica: int, num_replicas: int) -> list[TrainingSequence]:
    """A replica's sequences, by the trainer's own way."""
    requests = requests_of_replica(batch, 1, replica, num_replicas, score=False)
    return rollouts.sequences_of(GivenRationales().generate(requests, SAMPLING), batch, gold=True)


def rotate_by_float32(x_Td: torch.Tensor, base: float) -> torch.Tensor:
    """reference.rotate with sines in float32, which the models take in any dtype: 1e-8 apart from the exact ones."""
    T, d = x_Td.shape
    angle = torch.arange(T).float()[:, None] * (1.0 / base ** (torch.arange(0, d, 2).float() / d))
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second = x_Td.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def masked_cross_entropy(batch: list[Example], policy: str, *, per_token: bool):
    """(loss, gradients): torch's cross-entropy with the labels of prompt and bridge at -100, as trainers of Hugging
    Face's models write it. Mean over examples, or over all tokens.
    """
    reference.rotate = rotate_by_float32  # in a process of its own
    leaves = {name: w.double().requires_grad_() for name, w in reference.noisy_weights(POLICIES[policy]).items()}
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for e in batch:
        ids = torch.tensor(e.prompt_ids + e.rationale_ids + e.bridge_ids + e.answer_ids)
        labels, first = ids.clone(), len(e.prompt_ids) + len(e.rationale_ids)
        labels[: len(e.prompt_ids)] = -100
        labels[first : first + len(e.bridge_ids)] = -100
        logits = reference.token_logits(leaves, POLICIES[policy], ids.tolist())
        loss = loss + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        tokens += int((labels[1:] != -100).sum())
    loss = loss / (tokens if per_token else len(batch))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, gradients, strict=True))


def trained(runtime, batch: list[Example], estimator: Estimator, options: BatchOptions, policy: str):
    """(loss, gradients of this rank) of one step's training pass."""
    architecture = POLICIES[policy]
    wide = build_options(architecture, params_dtype=torch.float64)
    model = build(runtime, architecture, reference.noisy_weights(architecture), wide)
    shape, dp = (len(batch), 1), runtime.groups.dp
    unknown, everything = torch.full(shape, math.nan), torch.ones(shape, dtype=torch.bool)
    table = StepTable(unknown, everything, reward_BM=unknown)
    coefficients = estimator.coefficients(table, q=0.5, step=0)
    done = train_with(runtime, *model, sequences_of(batch, dp.rank(), dp.size()), options, coefficients)
    table = coefficients.rationale_BM * done.trained.table.log_z_BM
    loss = -(table + coefficients.answer_BM * done.trained.table.log_w_BM).sum().item()
    # The gradient buffers themselves: train_with keeps float32 copies.
    return loss, named_tensors(model[0], runtime, lambda p: p.main_grad)


def check(ranks, expected) -> None:
    loss, gradients = expected
    for found, _ in ranks:
        print(f"loss off by {abs(found / loss - 1):.1e}")
        assert found == pytest.approx(loss, rel=1e-12)
    worst = reference.norm_difference(join([parts for _, parts in ranks], SMALL.vocab_size, padding=0.0), gradients)
    print(f"gradients off by at most {max(worst.values()):.1e}")
    assert max(worst.values()) < TOLERANCE, worst


def _sft(runtime):
    estimator = Estimator("sft", 1, True, 5)
    return [trained(runtime, examples(), estimator, options, policy) for policy in POLICIES for options in BATCHES]


@pytest.fixture(scope="module")
def sft_expected():
    return {
        policy: run_apart(lambda p=policy: masked_cross_entropy(examples(), p, per_token=False)) for policy in POLICIES
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_has_the_gradient_of_cross_entropy_with_the_prompt_masked(layout, sft_expected):
    ranks = run_ranks(_sft, **LAYOUTS[layout])
    cases = [(policy, options) for policy in POLICIES for options in BATCHES]
    for n, (policy, _) in enumerate(cases):
        check([rank[n] for rank in ranks], sft_expected[policy])


# Pretraining


class Tokenizer:
    """As much of one as a corpus asks for."""

    vocab_size, eos_id = SMALL.vocab_size, 2

    def fingerprint(self) -> str:
        return "test"


def write(prefix: Path, documents: list[list[int]]) -> str:
    """Megatron-core's own builder, without our tool."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for ids in documents:
        builder.add_document(numpy.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents(count: int, low: int, high: int, seed: int) -> list[list[int]]:
    """Ragged, ids from low up to high, each ending in the end of text."""
    rng = random.Random(seed)
    return [[rng.randrange(low, high) for _ in range(rng.randint(3, 30))] + [2] for _ in range(count)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    """Prefixes: two that share no id but the end of text, so that a row's source can be told."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "one": write(folder / "one", documents(40, 3, 36, seed=1)),
        "two": write(folder / "two", documents(25, 36, 70, seed=2)),
    }


def options_for(data_path: str, folder: Path, **changes) -> CorpusOptions:
    settings = {
        "data_path": data_path, "split": "90,10", "seq_length": SEQ_LENGTH, "cache": folder / "cache", "seed": 3,
        "train_rows": 24, "heldout_rows": 4, **changes,
    }  # fmt: skip
    return CorpusOptions(**settings)


def _rows(runtime, *many: CorpusOptions, vocab_size: int = SMALL.vocab_size):
    """For each: (training rows, held-out rows, fingerprint), or the UserError's words."""
    found = []
    for options in many:
        try:
            corpus = open_corpus(options, Tokenizer(), vocab_size, runtime)
            rows = [[(*e.prompt_ids, *e.answer_ids) for e in part] for part in (corpus.train, corpus.heldout)]
            assert all(e.rationale_ids == () and len(e.prompt_ids) == 1 for e in corpus.train)
            found.append((*rows, corpus.fingerprint))
        except UserError as error:
            found.append(str(error))
    return found


def rows_of(*many: CorpusOptions, size: int = 1, **keywords):
    ranks = run_ranks(_rows_with, many, keywords, dp=size)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


def _rows_with(runtime, many, keywords):
    return _rows(runtime, *many, **keywords)


def test_rows_are_the_documents_end_to_end_every_token_predicted_once_an_epoch(corpora, tmp_path):
    dataset = IndexedDataset(corpora["one"])
    texts = [tuple(dataset[i].tolist()) for i in range(40)]
    split = {"train": texts[:36], "heldout": texts[36:]}
    tokens = {name: sum(map(len, some)) for name, some in split.items()}
    whole = {name: (count - 1) // SEQ_LENGTH for name, count in tokens.items()}
    everything = options_for(corpora["one"], tmp_path, train_rows=whole["train"], heldout_rows=100)
    [(train, heldout, _)] = rows_of(everything, size=2)
    for name, rows in (("train", train), ("heldout", heldout)):
        assert len(rows) == whole[name] > 0 and all(len(row) == SEQ_LENGTH + 1 for row in rows)
        for row in rows:
            for ids in pieces(row):
                assert any(_within(ids, text) for text in split[name]), ids
        standing = Counter(itertools.chain(*split[name]))
        predicted = Counter(token for row in rows for token in row[1:])
        left = standing - predicted
        assert predicted <= standing and left.total() == tokens[name] - whole[name] * SEQ_LENGTH <= SEQ_LENGTH


def pieces(row: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The row cut behind every end of text."""
    ends = [i + 1 for i, token in enumerate(row) if token == 2]
    return [row[a:b] for a, b in itertools.pairwise([0, *ends, len(row)]) if a < b]


def _within(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole)))


def test_a_blend_draws_by_weight_and_without_weights_by_tokens(corpora, tmp_path):
    one, two = corpora["one"], corpora["two"]
    weighted, plain = rows_of(
        options_for(f"3 {one} 1 {two}", tmp_path, train_rows=80), options_for(f"{one} {two}", tmp_path, train_rows=80)
    )
    of_two = [sum(max(row) >= 36 for row in rows[0]) for rows in (weighted, plain)]
    sizes = [open_files(p).tokens_between(0.0, 0.9) for p in (one, two)]
    assert of_two[0] == 20
    assert of_two[1] == pytest.approx(80 * sizes[1] / sum(sizes), abs=1)
    assert len(weighted[1]) == 4 and {max(row) >= 36 for row in weighted[1]} == {True, False}


def test_a_longer_run_keeps_the_order_until_the_files_end_and_its_fingerprint_says_so(corpora, tmp_path):
    def options(rows, **changes):
        return options_for(corpora["one"], tmp_path, train_rows=rows, **changes)

    short, longer, twice, other_seed, other_length = rows_of(
        options(8), options(16), options(200), options(8, seed=4), options(8, seq_length=13)
    )
    assert longer[0][:8] == short[0] and longer[2] == short[2]
    assert len({short[2], twice[2], other_seed[2], other_length[2]}) == 4
    assert twice[0][:8] != short[0]  # why its fingerprint must differ
    assert other_seed[0] != short[0]


def test_files_that_were_changed_under_their_name_are_read_anew(tmp_path):
    prefix = write(tmp_path / "same", documents(30, 3, 36, seed=5))
    [(before, _, first)] = rows_of(options_for(prefix, tmp_path))
    write(tmp_path / "same", documents(20, 36, 70, seed=6))
    [(after, _, second)] = rows_of(options_for(prefix, tmp_path))
    assert first != second and max(map(max, before)) < 36 <= max(map(max, after))


def _pretrain(runtime, options: CorpusOptions):
    corpus = open_corpus(options, Tokenizer(), SMALL.vocab_size, runtime)
    batch = [corpus.train[i] for i in InOrder(5).batch(2)]
    estimator = Estimator("pretrain", 1, True, 5, row_tokens=SEQ_LENGTH)
    results = [trained(runtime, batch, estimator, BATCHES[1], policy) for policy in POLICIES]
    return [(*e.prompt_ids, *e.answer_ids) for e in batch], results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretraining_has_the_loss_and_gradient_of_cross_entropy_a_token(layout, corpora, tmp_path):
    options = options_for(f"1 {corpora['one']} 1 {corpora['two']}", tmp_path)
    ranks = run_ranks(_pretrain, options, **LAYOUTS[layout])
    rows = ranks[0][0]
    assert all(rank[0] == rows for rank in ranks)
    batch = [Example(i, "", "", row[:1], row[1:], rationale_ids=()) for i, row in enumerate(rows)]
    for n, policy in enumerate(POLICIES):
        expected = run_apart(masked_cross_entropy_of_rows, batch, policy)
        check([rank[1][n] for rank in ranks], expected)


def masked_cross_entropy_of_rows(batch, policy):
    return masked_cross_entropy(batch, policy, per_token=True)


END = Tokenizer.eos_id


def megatrons_masks(runtime, options: CorpusOptions):
    """(row, loss mask, attention mask) of the training rows, with Megatron-core's own options for documents' ends."""
    own = reading._plan(options, Tokenizer(), SMALL.vocab_size)
    own.config.eod_mask_loss = own.config.reset_attention_mask = own.config.create_attention_mask = True
    own.config.path_to_cache = None
    sizes = [options.train_rows, own.heldout_rows, 0]
    dataset = reading._Builder(GPTDataset, sizes, lambda: True, own.config).build()[0]
    samples = [dataset[i] for i in range(options.train_rows)]
    rows = [(*s["tokens"].tolist(), s["labels"][-1].item()) for s in samples]
    return [(row, s["loss_mask"], s["attention_mask"][0]) for row, s in zip(rows, samples, strict=True)]


def test_documents_ends_are_masked_as_in_megatron(corpora, tmp_path):
    """--eod-mask-loss and --reset-attention-mask: what is scored, and what attends to what, of each of 24 rows."""
    options, cpu = options_for(corpora["one"], tmp_path), torch.device("cpu")
    [found] = run_ranks(megatrons_masks, options)
    assert {bool((mask == 0).any()) for _, mask, _ in found} == {True, False}
    for row, loss_mask, attention_mask in found:
        sequence = TrainingSequence(0, 0, row[:1], (), 0, row[1:])
        for multiple in (1, 8):
            packed = pack_sequences(
                [sequence], device=cpu, with_rationale=True, sequence_multiple=multiple, mask_loss_after_id=END,
                document_end_id=END,
            )  # fmt: skip
            scored = torch.zeros(SEQ_LENGTH)
            scored[packed.head.position_N] = 1
            assert torch.equal(scored, loss_mask)
            assert packed.head.target_N.tolist() == [row[i + 1] for i in range(SEQ_LENGTH) if loss_mask[i]]
            lengths = packed.attention.lengths
            assert sum(lengths) == len(packed.token_T) == -(-len(row) // multiple) * multiple
            assert packed.position_T.tolist() == [i for length in lengths for i in range(length)]
            blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths))[:SEQ_LENGTH, :SEQ_LENGTH]
            assert torch.equal(blocks == 0, attention_mask)  # Megatron's is True where nothing is seen


def _pretrain_apart(runtime, options: CorpusOptions):
    corpus = open_corpus(options, Tokenizer(), SMALL.vocab_size, runtime)
    rows = Batch(corpus.train, InOrder(5).batch(2))
    dp = runtime.groups.dp
    tokens = scored_tokens(sequences_of(rows, dp.rank(), dp.size()), END, runtime)
    estimator = Estimator("pretrain", 1, True, 5, row_tokens=tokens / len(rows))
    how = replace(BATCHES[0], share_prompts=False, mask_loss_after_id=END, document_end_id=END)
    results = [trained(runtime, rows, estimator, how, policy) for policy in POLICIES]
    return [(*e.prompt_ids, *e.answer_ids) for e in rows], results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_apart_have_the_loss_and_gradient_of_each_by_itself(layout, corpora, tmp_path):
    ranks = run_ranks(_pretrain_apart, options_for(corpora["one"], tmp_path), **LAYOUTS[layout])
    # A document's part of a row is a row of its own: its first token has none before it that predicts it.
    parts = [part for row in ranks[0][0] for part in pieces(row) if len(part) > 1]
    assert len(parts) > len(ranks[0][0])
    batch = [Example(i, "", "", part[:1], part[1:], rationale_ids=()) for i, part in enumerate(parts)]
    for n, policy in enumerate(POLICIES):
        check([rank[1][n] for rank in ranks], run_apart(masked_cross_entropy_of_rows, batch, policy))


def test_bad_files_are_refused_in_one_line_on_every_rank(corpora, tmp_path):
    one, cache = corpora["one"], tmp_path / "cache"
    cut, empty, other = tmp_path / "cut", tmp_path / "empty", tmp_path / "other"
    for path, data, index in (
        (cut, Path(f"{one}.bin").read_bytes()[:50], Path(f"{one}.idx").read_bytes()),
        (empty, b"", b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + bytes(16)),
        (other, b"text", b"no index of Megatron's, but long enough to hold the header of one"),
    ):
        Path(f"{path}.bin").write_bytes(data)
        Path(f"{path}.idx").write_bytes(index)
    faults = {
        f"{tmp_path}/none": f"there is no {tmp_path}/none.idx",
        str(cut): "cut.bin is cut off",
        str(empty): "holds no tokens",
        str(other): "is not an index of Megatron's",
        f"1 {one} {one} 2": "write a weight before every prefix, or before none",
        f"0 {one}": "must be above 0",
    }
    found = rows_of(*(options_for(path, tmp_path) for path in faults), size=2)
    for message, words in zip(found, faults.values(), strict=True):
        assert isinstance(message, str) and words in message and "\n" not in message
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = rows_of(
        options_for(one, tmp_path, seq_length=5000),
        options_for(one, tmp_path, split="0,1"),
        options_for(one, tmp_path, split="half"),
        replace(options_for(one, tmp_path), cache=blocked / "cache"),
        size=2,
    )
    words = ("fewer than a row of 5001", "--split 0,1", "--split half", "--data-cache-path")
    assert all(word in message for word, message in zip(words, found, strict=True)), found
    assert not cache.exists()


def _other_copy(runtime, prefixes: list[str], folder: Path):
    """What rank 1 is told, and rank 0, where each has the files of a prefix of its own."""
    folder = folder / str(runtime.rank)
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"same{suffix}").write_bytes(Path(f"{prefixes[runtime.rank]}{suffix}").read_bytes())
    os.chdir(folder)
    with pytest.raises(UserError) as fault:
        open_corpus(options_for("same", folder.parent), Tokenizer(), SMALL.vocab_size, runtime)
    return str(fault.value)


def test_other_files_of_the_same_name_on_another_node_are_refused_on_all_ranks(corpora, tmp_path):
    told = run_ranks(_other_copy, [corpora["one"], corpora["two"]], tmp_path, dp=2)
    assert told[0] == told[1] and told[0].startswith("--data-path same: the files on ")


def test_a_token_that_the_model_does_not_have_is_refused(corpora, tmp_path):
    [message] = rows_of(options_for(corpora["two"], tmp_path), vocab_size=60)
    assert message.startswith(f"--data-path {corpora['two']} holds token 69, and the model's vocabulary has 60")
    # Behind the first millions of tokens it is found when its row is read.
    late = documents(20, 3, 36, seed=7)
    late[10][1] = 66
    prefix = write(tmp_path / "late", late)
    [message] = run_ranks(_late_fault, options_for(prefix, tmp_path, train_rows=30))
    assert "holds token 66" in message


def _late_fault(runtime, options):
    from megatron_jq.corpus import files

    files._FIRST_TOKENS = 8
    corpus = open_corpus(options, Tokenizer(), 60, runtime)
    with pytest.raises(UserError) as fault:
        list(corpus.train)
    return str(fault.value)


def test_a_split_without_a_row_to_validate_on_gives_none(corpora, tmp_path):
    [(train, heldout, _), (_, none, _)] = rows_of(
        options_for(corpora["one"], tmp_path, split="999,1"), options_for(corpora["one"], tmp_path, split="100")
    )
    assert len(train) == 24 and heldout == none == []
