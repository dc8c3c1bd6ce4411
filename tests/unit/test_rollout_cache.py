"""The rollout's cache: attention over it equals attention over every row's own keys, and it holds each prompt once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.rollout.cache import DecodePlan, PrefillPlan, RolloutCache, TailPlan

HEADS, KV_HEADS, CHANNELS, SCALE, LAYER = 4, 2, 8, 0.3, 1
CPU = torch.device("cpu")
VECTOR_BYTES = 2 * KV_HEADS * CHANNELS * 8  # key and value of a token in a layer, float64


def plain(q_Lhd, k_Lgd, v_Lgd):
    """Attention of the last len(q) tokens of one sequence, causal."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k_Lgd, v_Lgd))
    score = SCALE * torch.einsum("qhd,khd->hqk", q_Lhd, k)
    ahead = torch.ones(len(q_Lhd), len(k), dtype=torch.bool).triu(len(k) - len(q_Lhd) + 1)
    return torch.einsum("hqk,khd->qhd", score.masked_fill(ahead, float("-inf")).softmax(-1), v)


class Wave:
    """A cache, and every row's keys and values in full."""

    def __init__(self, lengths: list[int], rows_per_prompt: list[int], generator: torch.Generator):
        self.generator = generator
        self.cache = RolloutCache(lengths, rows_per_prompt, CPU)
        q, k, v = self.draw(sum(lengths))
        found = PrefillPlan(lengths, 0, self.cache, CPU).attend(LAYER, q, k, v, SCALE)
        expected, self.keys, self.values = [], [], []
        for *mine, rows in zip(q.split(lengths), k.split(lengths), v.split(lengths), rows_per_prompt, strict=True):
            expected.append(plain(*mine))
            self.keys += [mine[1]] * rows
            self.values += [mine[2]] * rows
        torch.testing.assert_close(found, torch.cat(expected))

    def draw(self, tokens: int):
        shapes = [(tokens, heads, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        return [torch.randn(shape, dtype=torch.float64, generator=self.generator) for shape in shapes]

    def decode(self, padding: int) -> None:
        rows = len(self.keys)
        q, k, v = self.draw(rows + padding)
        found = DecodePlan(self.cache).attend(LAYER, q, k, v, SCALE)
        self.cache.length += 1
        self.keys = [torch.cat([old, new[None]]) for old, new in zip(self.keys, k, strict=False)]
        self.values = [torch.cat([old, new[None]]) for old, new in zip(self.values, v, strict=False)]
        expected = [plain(q[i, None], self.keys[i], self.values[i]) for i in range(rows)]
        torch.testing.assert_close(found, torch.cat([*expected, torch.zeros_like(q[rows:])]))

    def tail(self, rows: list[int], forgotten: list[int], lengths: list[int]) -> None:
        """New tokens of some rows; the last `forgotten` generated ones of each do not count."""
        q, k, v = self.draw(sum(lengths))
        cached = [self.cache.length - n for n in forgotten]
        found = TailPlan(self.cache, rows, cached, lengths, CPU).attend(LAYER, q, k, v, SCALE)
        parts = zip(rows, forgotten, q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        expected = [
            plain(
                query,
                torch.cat([self.keys[row][: len(self.keys[row]) - gone], key]),
                torch.cat([self.values[row][: len(self.values[row]) - gone], value]),
            )
            for row, gone, query, key, value in parts
        ]
        torch.testing.assert_close(found, torch.cat(expected))

    def keep(self, rows: list[int]) -> None:
        self.cache.keep(rows)
        self.keys, self.values = ([x[i] for i in rows] for x in (self.keys, self.values))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_attention_over_the_cache_equals_attention_over_plain_sequences(data):
    lengths = sorted(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(lengths), max_size=len(lengths)))
    wave = Wave(lengths, counts, torch.Generator().manual_seed(data.draw(st.integers(0, 2**20))))
    for _ in range(data.draw(st.integers(0, 3))):
        for _ in range(data.draw(st.integers(0, 3))):
            wave.decode(data.draw(st.sampled_from([0, 3])))
        rows_left = st.sets(st.integers(0, len(wave.keys) - 1), min_size=1)
        rows = sorted(data.draw(rows_left))
        forgotten = [data.draw(st.integers(0, wave.cache.length)) for _ in rows]
        wave.tail(rows, forgotten, [data.draw(st.integers(1, 3)) for _ in rows])
        wave.keep(sorted(data.draw(rows_left)))


def test_the_cache_holds_each_prompt_once_and_frees_what_is_done():
    lengths, counts = [5, 5, 9, 30], [4, 1, 3, 2]
    padded = [9, 9, 9, 30]  # prompts of similar length are as long as the longest of them
    wave = Wave(lengths, counts, torch.Generator().manual_seed(1))
    assert wave.cache.num_bytes == sum(padded) * VECTOR_BYTES
    for _ in range(RolloutCache.GROWTH):
        wave.decode(0)
    generated = RolloutCache.GROWTH
    assert wave.cache.num_bytes == (sum(padded) + sum(counts) * generated) * VECTOR_BYTES
    wave.keep([0, 2, 8])  # two rows of the first prompt, one of the last: the others' prompts go too
    assert wave.cache.num_bytes == (9 + 30 + 3 * generated) * VECTOR_BYTES
    wave.decode(0)
    assert wave.cache.num_bytes == (9 + 30 + 3 * 2 * generated) * VECTOR_BYTES


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40).map(sorted))
def test_padding_at_most_doubles_the_prompts_and_buckets_are_few(lengths):
    cache = RolloutCache(lengths, [1] * len(lengths), CPU)
    padded = [bucket.length for bucket in cache.buckets for _ in bucket.rows_per_prompt]
    assert all(own <= length <= 2 * own for own, length in zip(lengths, padded, strict=True))
    assert len(cache.buckets) <= 9  # each begins beyond twice the last one's first: 1, 3, 7, … 511
