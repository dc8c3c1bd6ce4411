"""F3: keys and values of a batch of rationales: each prompt's once, each rationale's own after it.

Axes: G prompts of similar length, L that of the longest, N rationales (rows), R room for generated tokens, g key/value
groups, s query heads a group, d channels a head. Heads are this tensor-parallel rank's, layers this pipeline stage's.
"""

import torch
from torch import Tensor

from megatron_jq.model.attention import AttentionPlan, CausalSegments
from megatron_jq.parallel.transfers import to_device


class RowGroups:
    """Rows of one prompt side by side, so that queries of all of them meet the prompt's keys in one product.

    rows_per_prompt: of each prompt in turn. Each prompt has as many places as the busiest one needs.
    """

    def __init__(self, rows_per_prompt: list[int], device: torch.device):
        self.prompts, self.widest = len(rows_per_prompt), max(rows_per_prompt)
        places = [b * self.widest + n for b, count in enumerate(rows_per_prompt) for n in range(count)]
        self.full = len(places) == self.prompts * self.widest
        row_at_place = torch.zeros(self.prompts * self.widest, dtype=torch.long)  # an empty place's result is not read
        row_at_place[places] = torch.arange(len(places))
        self.place_of_row = to_device(torch.tensor(places), device)
        self.row_at_place = to_device(row_at_place, device)

    def gather_by_prompt(self, x_N: Tensor) -> Tensor:
        """[N, g, s, ·] by row → [G, g, places·s, ·] by prompt."""
        x_N = x_N if self.full else x_N[self.row_at_place]
        return x_N.unflatten(0, (self.prompts, self.widest)).transpose(1, 2).flatten(2, 3)

    def scatter_to_rows(self, x_G: Tensor) -> Tensor:
        """[G, g, places·s, ·] by prompt → [N, g, s, ·] by row."""
        x = x_G.unflatten(2, (self.widest, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.full else x[self.place_of_row]


class Bucket:
    """Prompts of similar length that stand side by side in the batch: one product for all of them.

    Keys and values are padded at the end to the longest prompt; no query meets the padding. first: where these prompts
    begin in the packed row. lengths: of each prompt.
    """

    #: The shortest prompt has at least this share of the longest one's tokens: bounds the padding.
    FILL = 0.5

    def __init__(self, first: int, lengths: list[int], rows_per_prompt: list[int], device: torch.device):
        self.length, self.rows_per_prompt = max(lengths), rows_per_prompt
        length_G1, place_L = torch.tensor(lengths)[:, None], torch.arange(self.length)
        first_G1 = first + length_G1.cumsum(0) - length_G1
        token_GL = first_G1 + torch.minimum(place_L, length_G1 - 1)  # padding repeats a prompt's last token
        padding_G11L = (place_L >= length_G1)[:, None, None]
        self.token_GL = to_device(token_GL, device)
        self.padding_G11L = to_device(padding_G11L, device) if padding_G11L.any() else None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer → keys, values [G, g, L, d]

    def store(self, layer: int, k_Tgd: Tensor, v_Tgd: Tensor) -> None:
        """Take these prompts' keys and values out of the packed row."""
        keys, values = (x[self.token_GL].transpose(1, 2).contiguous() for x in (k_Tgd, v_Tgd))
        self.layers[layer] = keys, values

    def scores(self, layer: int, q_Ggnd: Tensor) -> Tensor:
        """Of queries gathered by prompt: [G, g, n, L]."""
        scores = q_Ggnd @ self.layers[layer][0].transpose(2, 3)
        return scores if self.padding_G11L is None else scores.masked_fill_(self.padding_G11L, float("-inf"))

    def keep(self, rows_per_prompt: list[int]) -> None:
        """Take the rows that are left of each prompt; prompts without any are freed."""
        left = [b for b, rows in enumerate(rows_per_prompt) if rows]
        if len(left) < len(rows_per_prompt):
            self.layers = {layer: (k[left], v[left]) for layer, (k, v) in self.layers.items()}
            self.padding_G11L = None if self.padding_G11L is None else self.padding_G11L[left]
        self.rows_per_prompt = [rows_per_prompt[b] for b in left]


def _similar(lengths: list[int]) -> list[list[int]]:
    """Ascending lengths, cut where a bucket would be filled too little."""
    buckets: list[list[int]] = []
    for length in lengths:
        if buckets and Bucket.FILL * length <= buckets[-1][0]:
            buckets[-1].append(length)
        else:
            buckets.append([length])
    return buckets


class PromptAttention:
    """Queries of some rows, ascending, with the prompts of each: which rows of the query meet which bucket."""

    def __init__(self, buckets: list[Bucket], rows_per_prompt: list[list[int]], device: torch.device):
        """rows_per_prompt: by bucket and prompt, of the rows that ask."""
        self.parts: list[tuple[Bucket, slice, RowGroups]] = []
        first = 0
        for bucket, counts in zip(buckets, rows_per_prompt, strict=True):
            if any(counts):
                self.parts.append((bucket, slice(first, first + sum(counts)), RowGroups(counts, device)))
                first += sum(counts)

    def attend(self, layer: int, q_Ngsd: Tensor, of_branch_Ngst: Tensor, values_Ngtd: Tensor) -> Tensor:
        """Scaled queries against their prompts' keys and, by the scores [N, g, s, t] given, their own: [N, g, s, d]."""
        outputs, exact = [], torch.promote_types(q_Ngsd.dtype, torch.float32)
        for bucket, rows, groups in self.parts:
            of_prompt = groups.scatter_to_rows(bucket.scores(layer, groups.gather_by_prompt(q_Ngsd[rows]))).to(exact)
            of_branch = of_branch_Ngst[rows].to(exact)
            weight = torch.cat([of_prompt, of_branch], dim=-1).softmax(dim=-1).to(q_Ngsd.dtype)
            of_prompt, of_branch = weight.split([bucket.length, of_branch.shape[-1]], dim=-1)
            from_prompt = groups.scatter_to_rows(groups.gather_by_prompt(of_prompt) @ bucket.layers[layer][1])
            outputs.append(from_prompt + of_branch @ values_Ngtd[rows])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class RolloutCache:
    """Keys and values by layer. Rows are ordered by prompt; dropping finished rows keeps that order.

    Per layer, keys hold one vector a key/value group for each prompt token and for each row's room: a prompt that was
    copied to its M rows would be M times as long. Every row is fed one token a step, so all rows hold equally many
    generated tokens: `length`.
    """

    #: Room for generated tokens grows by this many at a time.
    GROWTH = 64

    def __init__(self, prompt_lengths: list[int], rows_per_prompt: list[int], device: torch.device):
        """Prompts stand in order of their length."""
        self.device, self.length = device, 0
        self.buckets, tokens, prompts = [], 0, 0
        for lengths in _similar(prompt_lengths):
            counts = rows_per_prompt[prompts : prompts + len(lengths)]
            self.buckets.append(Bucket(tokens, lengths, counts, device))
            tokens, prompts = tokens + sum(lengths), prompts + len(lengths)
        self.branch: dict[int, tuple[Tensor, Tensor]] = {}  # layer → keys, values [N, g, R, d]
        self.prompt_attention = self._prompt_attention()

    @property
    def rows(self) -> int:
        return sum(sum(bucket.rows_per_prompt) for bucket in self.buckets)

    @property
    def num_bytes(self) -> int:
        """Of keys and values, on this rank."""
        pairs = [pair for bucket in self.buckets for pair in bucket.layers.values()]
        return sum(x.nbytes for pair in (*pairs, *self.branch.values()) for x in pair)

    def _prompt_attention(self) -> PromptAttention:
        return PromptAttention(self.buckets, [bucket.rows_per_prompt for bucket in self.buckets], self.device)

    def prompt_of_row(self) -> list[tuple[int, int]]:
        """(bucket, prompt in it) of each row."""
        return [
            (i, b)
            for i, bucket in enumerate(self.buckets)
            for b, rows in enumerate(bucket.rows_per_prompt)
            for _ in range(rows)
        ]

    def count(self, rows: list[int]) -> list[list[int]]:
        """How many of these rows each prompt has, by bucket."""
        counts = [[0] * len(bucket.rows_per_prompt) for bucket in self.buckets]
        prompt_of_row = self.prompt_of_row()
        for row in rows:
            bucket, prompt = prompt_of_row[row]
            counts[bucket][prompt] += 1
        return counts

    def store_prompts(self, layer: int, k_Tgd: Tensor, v_Tgd: Tensor) -> None:
        """The prompts' packed keys and values, in order; what stands after them is padding."""
        for bucket in self.buckets:
            bucket.store(layer, k_Tgd, v_Tgd)

    def append(self, layer: int, k_Ngd: Tensor, v_Ngd: Tensor) -> tuple[Tensor, Tensor]:
        """Write each row's next token; returns the layer's keys and values so far, [N, g, length + 1, d]."""
        if layer not in self.branch:
            empty = k_Ngd.new_empty(k_Ngd.shape[0], k_Ngd.shape[1], 0, k_Ngd.shape[2])
            self.branch[layer] = (empty, empty)
        if self.branch[layer][0].shape[2] == self.length:
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, self.GROWTH)) for x in self.branch[layer])
            self.branch[layer] = keys, values
        keys, values = self.branch[layer]
        keys[:, :, self.length], values[:, :, self.length] = k_Ngd, v_Ngd
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (ascending), and the prompts without rows; their keys and values are freed."""
        counts, index = self.count(rows), to_device(torch.tensor(rows), self.device)
        for bucket, left in zip(self.buckets, counts, strict=True):
            bucket.keep(left)
        self.buckets = [bucket for bucket in self.buckets if bucket.rows_per_prompt]
        self.branch = {layer: (k[index], v[index]) for layer, (k, v) in self.branch.items()}
        self.prompt_attention = self._prompt_attention()


class PrefillPlan(CausalSegments):
    """Causal attention over packed prompts that leaves their keys and values in the cache."""

    def __init__(self, lengths: list[int], padding: int, cache: RolloutCache, device: torch.device):
        super().__init__([*lengths, padding] if padding else lengths, device)
        self.cache = cache

    def attend(self, layer, q, k, v, scale):
        self.cache.store_prompts(layer, k, v)
        return super().attend(layer, q, k, v, scale)


class DecodePlan(AttentionPlan):
    """One new token a row: it attends to its prompt's cached keys (shared by the group) and to its own."""

    def __init__(self, cache: RolloutCache):
        super().__init__()
        self.cache, self.rows = cache, cache.rows

    def attend(self, layer, q, k, v, scale):
        keys, values = self.cache.append(layer, k[: self.rows], v[: self.rows])
        q_Ngsd = q[: self.rows].unflatten(1, (k.shape[1], -1)) * scale
        output = self.cache.prompt_attention.attend(layer, q_Ngsd, q_Ngsd @ keys.transpose(2, 3), values)
        return _with_padding(output.flatten(1, 2), q)


class TailPlan(AttentionPlan):
    """Several new tokens a row at once, not kept: they attend to the prompt, to the row's cached tokens, to each other.

    rows: which of the cache's rows, ascending, [n]. cached: how many of each row's generated tokens count, [n].
    lengths: new tokens of each row; one row's after another's, [T].
    """

    def __init__(
        self, cache: RolloutCache, rows: list[int], cached: list[int], lengths: list[int], device: torch.device
    ):
        super().__init__()
        self.cache, self.rows = cache, to_device(torch.tensor(rows), device)
        self.prompt_attention = PromptAttention(cache.buckets, cache.count(rows), device)
        count, longest = torch.tensor(lengths), max(lengths)
        start = count.cumsum(0) - count
        token_nt = start[:, None] + torch.minimum(torch.arange(longest), count[:, None] - 1)
        self.token_nt = to_device(token_nt, device)
        place = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
        self.place_T = to_device(place, device)  # of the row's tokens in the padded [n, t]
        ahead_tt = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        beyond_nc = torch.arange(cache.length) >= torch.tensor(cached)[:, None]
        hidden = [beyond_nc[:, None].expand(-1, longest, -1), ahead_tt.expand(len(lengths), -1, -1)]
        self.mask = to_device(torch.cat(hidden, dim=2), device)  # [n, t, cached + t], True = not attended to

    def attend(self, layer, q, k, v, scale):
        cache, groups = self.cache, k.shape[1]
        q_ngtsd = q[self.token_nt].unflatten(2, (groups, -1)).transpose(1, 2) * scale
        per_token = q_ngtsd.shape[3]
        q_ngsd = q_ngtsd.flatten(2, 3)
        k_new, v_new = (x[self.token_nt].transpose(1, 2) for x in (k, v))
        keys, values = k_new, v_new
        if cache.length:
            old_keys, old_values = (x[self.rows, :, : cache.length] for x in cache.branch[layer])
            keys, values = torch.cat([old_keys, k_new], dim=2), torch.cat([old_values, v_new], dim=2)
        of_branch = q_ngsd @ keys.transpose(2, 3)
        of_branch = of_branch.masked_fill(self.mask.repeat_interleave(per_token, dim=1)[:, None], float("-inf"))
        output = self.prompt_attention.attend(layer, q_ngsd, of_branch, values)
        output = output.unflatten(2, (-1, per_token)).transpose(1, 2).flatten(0, 1).flatten(1, 2)  # [n·t, h, d]
        return _with_padding(output[self.place_T], q)


def _with_padding(output_Thd: Tensor, q_Thd: Tensor) -> Tensor:
    """Append zeros for the tokens that only fill the tensor-parallel split of the row."""
    missing = len(q_Thd) - len(output_Thd)
    return torch.cat([output_Thd, torch.zeros_like(q_Thd[:missing])]) if missing else output_Thd
