"""F3: keys and values of a wave of rationales: each prompt's once, each rationale's own behind it.

Axes: G prompts of the wave, N rationales (rows), L longest prompt, R room for generated tokens, g key/value groups, s
query heads a group, d channels a head. Heads are this tensor-parallel rank's, layers this pipeline stage's.
"""

import torch
from torch import Tensor

from megatron_jq.model.attention import AttentionPlan, CausalSegments


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
        self._seat_rows()

    def _seat_rows(self) -> None:
        """Seats: rows of one prompt side by side, as many seats a prompt as its busiest one needs."""
        counts = torch.bincount(self.group_of_row, minlength=len(self.prompt_lengths))
        widest, first = int(counts.max()), counts.cumsum(0) - counts
        number = torch.arange(len(self.group_of_row), device=counts.device) - first[self.group_of_row]
        self.seats = (len(counts), widest)
        self.seat_of_row = self.group_of_row * widest + number
        self.all_seats_taken = len(self.group_of_row) == len(counts) * widest

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
        self._seat_rows()

    def seat(self, x_N: Tensor) -> Tensor:
        """[N, g, s, ·] by row → [G, g, seats·s, ·] by prompt; empty seats are zero."""
        prompts, widest = self.seats
        if not self.all_seats_taken:
            x_N = x_N.new_zeros(prompts * widest, *x_N.shape[1:]).index_copy(0, self.seat_of_row, x_N)
        return x_N.unflatten(0, (prompts, widest)).transpose(1, 2).flatten(2, 3)

    def unseat(self, x_G: Tensor) -> Tensor:
        """[G, g, seats·s, ·] by prompt → [N, g, s, ·] by row."""
        x = x_G.unflatten(2, (self.seats[1], -1)).transpose(1, 2).flatten(0, 1)
        return x if self.all_seats_taken else x[self.seat_of_row]


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
        padding = q[rows:]  # rows that only fill the tensor-parallel split
        keys, values = cache.append(layer, k[:rows], v[:rows])
        prompt_keys, prompt_values = cache.prompt[layer]
        q_Ngsd = q[:rows].unflatten(1, (k.shape[1], -1)) * scale
        prompt_score = (cache.seat(q_Ngsd) @ prompt_keys.transpose(2, 3)).float()
        if cache.prompt_mask_GL is not None:
            prompt_score = prompt_score.masked_fill(cache.prompt_mask_GL[:, None, None, :], float("-inf"))
        prompt_score = cache.unseat(prompt_score)
        branch_score = (q_Ngsd @ keys.transpose(2, 3)).float()
        weight = torch.cat([prompt_score, branch_score], dim=-1).softmax(dim=-1).to(q.dtype)
        of_prompt, of_branch = weight.split([prompt_score.shape[-1], branch_score.shape[-1]], dim=-1)
        output = cache.unseat(cache.seat(of_prompt) @ prompt_values) + of_branch @ values
        output = output.flatten(1, 2)
        return torch.cat([output, torch.zeros_like(padding)]) if len(padding) else output
