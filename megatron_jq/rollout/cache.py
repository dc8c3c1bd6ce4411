"""F3: keys and values of a wave of rationales: each prompt's once, each rationale's own behind it.

Axes: G prompts of the wave, N rationales (rows), L longest prompt, R room for generated tokens, g key/value groups, s
query heads a group, d channels a head. Heads are this tensor-parallel rank's, layers this pipeline stage's.
"""

import torch
from torch import Tensor

from megatron_jq.model.attention import AttentionPlan, CausalSegments


class Seating:
    """Rows of one prompt side by side, so that queries of all of them meet the prompt's keys in one product.

    group_of_row: each row's prompt, ascending, [N]; as many seats a prompt as its busiest one needs.
    """

    def __init__(self, group_of_row: Tensor, num_prompts: int):
        counts = torch.bincount(group_of_row, minlength=num_prompts)
        self.prompts, self.widest = num_prompts, int(counts.max())
        number = torch.arange(len(group_of_row), device=counts.device) - (counts.cumsum(0) - counts)[group_of_row]
        self.seat_of_row = group_of_row * self.widest + number
        self.full = len(group_of_row) == self.prompts * self.widest

    def seat(self, x_N: Tensor) -> Tensor:
        """[N, g, s, ·] by row → [G, g, seats·s, ·] by prompt; empty seats are zero."""
        if not self.full:
            x_N = x_N.new_zeros(self.prompts * self.widest, *x_N.shape[1:]).index_copy(0, self.seat_of_row, x_N)
        return x_N.unflatten(0, (self.prompts, self.widest)).transpose(1, 2).flatten(2, 3)

    def unseat(self, x_G: Tensor) -> Tensor:
        """[G, g, seats·s, ·] by prompt → [N, g, s, ·] by row."""
        x = x_G.unflatten(2, (self.widest, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.full else x[self.seat_of_row]


class WaveCache:
    """Keys and values by layer. Rows are ordered by prompt; dropping finished rows keeps that order.

    Every row is fed one token a step, so all rows hold equally many generated tokens: `length`.
    """

    #: Room for generated tokens grows by this many at a time.
    GROWTH = 64

    def __init__(self, prompt_lengths: list[int], rows_per_prompt: list[int], device: torch.device):
        self.prompt_lengths = torch.tensor(prompt_lengths, device=device)
        counts = torch.tensor(rows_per_prompt)
        self.group_of_row = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        self.length = 0
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}  # layer → keys, values [G, g, L, d]
        self.branch: dict[int, tuple[Tensor, Tensor]] = {}  # layer → keys, values [N, g, R, d]
        past_end_GL = torch.arange(max(prompt_lengths), device=device) >= self.prompt_lengths[:, None]
        self.prompt_mask_GL = past_end_GL if len(set(prompt_lengths)) > 1 else None
        self.seating = Seating(self.group_of_row, len(prompt_lengths))

    def store_prompts(self, layer: int, k_Tgd: Tensor, v_Tgd: Tensor, token_GL: Tensor) -> None:
        self.prompt[layer] = tuple(x[token_GL].transpose(1, 2).contiguous() for x in (k_Tgd, v_Tgd))

    def append(self, layer: int, k_Ngd: Tensor, v_Ngd: Tensor) -> tuple[Tensor, Tensor]:
        """Write each row's next token; returns the layer's keys and values so far, [N, g, length + 1, d]."""
        if layer not in self.branch:
            empty = k_Ngd.new_empty(k_Ngd.shape[0], k_Ngd.shape[1], 0, k_Ngd.shape[2])
            self.branch[layer] = (empty, empty)
        if self.branch[layer][0].shape[2] == self.length:
            self.branch[layer] = tuple(torch.nn.functional.pad(x, (0, 0, 0, self.GROWTH)) for x in self.branch[layer])
        keys, values = self.branch[layer]
        keys[:, :, self.length], values[:, :, self.length] = k_Ngd, v_Ngd
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (ascending); their keys and values are freed."""
        self.group_of_row = self.group_of_row[rows]
        self.branch = {layer: (k[rows], v[rows]) for layer, (k, v) in self.branch.items()}
        self.seating = Seating(self.group_of_row, len(self.prompt_lengths))

    def prompt_scores(self, layer: int, q_Ngsd: Tensor, seating: Seating) -> Tensor:
        """Scaled queries against their prompts' keys: [N, g, s, L] float32, -inf beyond a prompt's end."""
        score = (seating.seat(q_Ngsd) @ self.prompt[layer][0].transpose(2, 3)).float()
        if self.prompt_mask_GL is not None:
            score = score.masked_fill(self.prompt_mask_GL[:, None, None, :], float("-inf"))
        return seating.unseat(score)

    def prompt_values(self, layer: int, weight_NgsL: Tensor, seating: Seating) -> Tensor:
        return seating.unseat(seating.seat(weight_NgsL) @ self.prompt[layer][1])


class PrefillPlan(CausalSegments):
    """Causal attention over packed prompts that leaves their keys and values in the cache."""

    def __init__(self, lengths: list[int], padding: int, cache: WaveCache, device: torch.device):
        super().__init__([*lengths, padding] if padding else lengths, device)
        self.cache = cache
        start = torch.tensor([0, *lengths]).cumsum(0)[:-1, None]
        inside = torch.arange(max(lengths))[None, :]
        self.token_GL = (start + torch.minimum(inside, torch.tensor(lengths)[:, None] - 1)).to(device)

    def attend(self, layer, q, k, v, scale):
        self.cache.store_prompts(layer, k, v, self.token_GL)
        return super().attend(layer, q, k, v, scale)


class DecodePlan(AttentionPlan):
    """One new token a row: it attends to its prompt's cached keys (shared by the group) and to its own."""

    def __init__(self, cache: WaveCache):
        super().__init__()
        self.cache = cache

    def attend(self, layer, q, k, v, scale):
        cache, rows = self.cache, len(self.cache.group_of_row)
        keys, values = cache.append(layer, k[:rows], v[:rows])
        q_Ngsd = q[:rows].unflatten(1, (k.shape[1], -1)) * scale
        of_prompt = cache.prompt_scores(layer, q_Ngsd, cache.seating)
        of_branch = (q_Ngsd @ keys.transpose(2, 3)).float()
        weight = torch.cat([of_prompt, of_branch], dim=-1).softmax(dim=-1).to(q.dtype)
        of_prompt, of_branch = weight.split([of_prompt.shape[-1], of_branch.shape[-1]], dim=-1)
        output = cache.prompt_values(layer, of_prompt, cache.seating) + of_branch @ values
        return _with_padding(output.flatten(1, 2), q)


class TailPlan(AttentionPlan):
    """Several new tokens a row at once, not kept: they attend to the prompt, to the row's cached tokens, to each other.

    rows: which of the cache's rows, ascending, [n]. cached: how many of each row's generated tokens count, [n].
    lengths: new tokens of each row; they lie behind one another, [T].
    """

    def __init__(self, cache: WaveCache, rows: Tensor, cached: list[int], lengths: list[int], device: torch.device):
        super().__init__()
        self.cache, self.rows = cache, rows
        self.seating = Seating(cache.group_of_row[rows], len(cache.prompt_lengths))
        count, longest = torch.tensor(lengths), max(lengths)
        start = count.cumsum(0) - count
        self.token_nt = (start[:, None] + torch.minimum(torch.arange(longest), count[:, None] - 1)).to(device)
        place = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
        self.place_T = place.to(device)  # of the row's tokens in the padded [n, t]
        ahead_tt = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        beyond_nc = torch.arange(cache.length) >= torch.tensor(cached)[:, None]
        hidden = [beyond_nc[:, None].expand(-1, longest, -1), ahead_tt.expand(len(lengths), -1, -1)]
        self.mask = torch.cat(hidden, dim=2).to(device)  # [n, t, cached + t], True = not attended to

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
        of_prompt = cache.prompt_scores(layer, q_ngsd, self.seating)
        of_branch = (q_ngsd @ keys.transpose(2, 3)).float()
        of_branch = of_branch.masked_fill(self.mask.repeat_interleave(per_token, dim=1)[:, None], float("-inf"))
        weight = torch.cat([of_prompt, of_branch], dim=-1).softmax(dim=-1).to(q.dtype)
        of_prompt, of_branch = weight.split([of_prompt.shape[-1], of_branch.shape[-1]], dim=-1)
        output = cache.prompt_values(layer, of_prompt, self.seating) + of_branch @ values
        output = output.unflatten(2, (-1, per_token)).transpose(1, 2).flatten(0, 1).flatten(1, 2)  # [n·t, h, d]
        return _with_padding(output[self.place_T], q)


def _with_padding(output_Thd: Tensor, q_Thd: Tensor) -> Tensor:
    """Append zeros for the tokens that only fill the tensor-parallel split of the row."""
    missing = len(q_Thd) - len(output_Thd)
    return torch.cat([output_Thd, torch.zeros_like(q_Thd[:missing])]) if missing else output_Thd
