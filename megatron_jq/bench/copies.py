"""F4: generation in which every rationale has its own copy of its prompt's keys and values, for benchmarks."""

import copy

import torch

from megatron_jq.rollout.cache import Bucket, RolloutCache
from megatron_jq.rollout.engine import RolloutRequest
from megatron_jq.rollout.megatron import MegatronEngine


class CopyingEngine(MegatronEngine):
    """Prefills a prompt once, as MegatronEngine does, then copies its keys and values to each rationale."""

    def _prefill(self, batch: list[RolloutRequest], cache: RolloutCache) -> torch.Tensor | None:
        logits = super()._prefill(batch, cache)
        cache.buckets = [_copied(bucket) for bucket in cache.buckets]
        cache.keep(list(range(cache.rows)))
        return logits


def _copied(bucket: Bucket) -> Bucket:
    counts = torch.tensor(bucket.rows_per_prompt, device=bucket.token_GL.device)
    copies = copy.copy(bucket)
    copies.rows_per_prompt = [1] * sum(bucket.rows_per_prompt)
    copies.layers = {
        layer: tuple(x.repeat_interleave(counts, dim=0) for x in pair) for layer, pair in bucket.layers.items()
    }
    if bucket.padding_G11L is not None:
        copies.padding_G11L = bucket.padding_G11L.repeat_interleave(counts, dim=0)
    return copies
