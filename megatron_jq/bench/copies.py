"""F4: generation in which every rationale has its own copy of its prompt's keys and values, for benchmarks."""

import torch

from megatron_jq.rollout.cache import Bucket, WaveCache
from megatron_jq.rollout.engine import RolloutRequest
from megatron_jq.rollout.megatron import MegatronEngine


class CopyingEngine(MegatronEngine):
    """Prefills a prompt once, as MegatronEngine does, then copies its keys and values to each rationale."""

    def _prefill(self, wave: list[RolloutRequest], cache: WaveCache) -> torch.Tensor | None:
        logits = super()._prefill(wave, cache)
        cache.buckets = [_copied(bucket) for bucket in cache.buckets]
        cache.keep(list(range(cache.rows)))
        return logits


def _copied(bucket: Bucket) -> Bucket:
    copies = Bucket(bucket.length, [1] * sum(bucket.rows_per_prompt))
    counts = torch.tensor(bucket.rows_per_prompt, device=next(iter(bucket.layers.values()))[0].device)
    copies.layers = {
        layer: tuple(x.repeat_interleave(counts, dim=0) for x in pair) for layer, pair in bucket.layers.items()
    }
    return copies
