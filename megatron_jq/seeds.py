"""F0: one stream of random numbers for each purpose and key. Streams of other seeds, steps or purposes never coincide.

Who draws what: docs/loss-scaling.md, "Random streams". Numbers are never made from a seed by shifts or by sums that
another seed reaches as well; torch's CPU generator reads 32 bits of a seed, so it gets a hash of a longer one.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

#: Evaluation samples with this added to --seed.
EVALUATION_SEED_OFFSET = 1_000_003
#: Marks the seeds of training rollouts that evaluation's sum could reach. Above 2^64, so that it stays a word of its
#: own in numpy's SeedSequence, and larger than any prompt's or rationale's number.
_TRAINING = 0x7472_6169 << 64


def stream(purpose: str, *key: int) -> "numpy.random.Generator":
    """Return the generator (Philox) of a purpose and its key: any integers, of any size and sign."""
    import numpy as np  # here alone: objective/, which reads this file, needs torch and nothing else

    text = f"megatron-jq {purpose} {' '.join(map(str, key))}"
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_hash(text, 32))))


def rollout_seed(seed: int) -> int:
    """Return the seed of training's rollouts: --seed itself, but where an evaluation's could be the same number."""
    return seed if seed < EVALUATION_SEED_OFFSET else seed + _TRAINING


def evaluation_seed(seed: int) -> int:
    """Return the seed of an evaluation's samples."""
    return seed + EVALUATION_SEED_OFFSET


def short_seed(seed: int) -> int:
    """Return a seed for generators that read 32 bits of it: the seed itself where that is enough, else a hash."""
    return seed if 0 <= seed < 1 << 32 else _hash(f"megatron-jq seed {seed}", 4)


def _hash(text: str, size: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")
