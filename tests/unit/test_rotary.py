"""Rotary angles against formulas written out in plain numbers, at short and long positions, scaled and not."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_jq.architecture import RopeScaling
from megatron_jq.model.rotary import RotaryAt

CPU = torch.device("cpu")
POSITIONS = [0, 1, 2, 31, 511, 4095, 40_959, 131_071]
LLAMA_3_2 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA_3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def frequencies(channels: int, base: float, scaling: RopeScaling | None) -> list[float]:
    """base^(-2i/d), then Llama 3's rule as transformers publishes it, frequency by frequency, in double precision."""
    result = []
    for i in range(channels // 2):
        frequency = base ** (-2 * i / channels)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            low_wavelength = scaling.original_max_position_embeddings / scaling.low_freq_factor
            high_wavelength = scaling.original_max_position_embeddings / scaling.high_freq_factor
            if wavelength > low_wavelength:
                frequency = frequency / scaling.factor
            elif wavelength >= high_wavelength:
                smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        result.append(frequency)
    return result


@pytest.mark.parametrize(
    ("channels", "base", "scaling"),
    [(16, 1e4, None), (128, 1e6, None), (64, 5e5, LLAMA_3_2), (128, 5e5, LLAMA_3_1)],
    ids=["tiny", "qwen3", "llama-3.2", "llama-3.1"],
)
def test_angles_are_position_times_frequency_in_the_half_split_layout(channels, base, scaling):
    actual = RotaryAt(channels, base, scaling, CPU).at(torch.tensor(POSITIONS))
    assert actual.shape == (len(POSITIONS), 1, 1, channels) and actual.dtype == torch.float32
    expected = frequencies(channels, base, scaling)
    for t, position in enumerate(POSITIONS):
        assert actual[t, 0, 0].tolist() == pytest.approx([position * f for f in expected + expected], rel=5e-6)


def test_llama_scaling_reaches_all_three_of_its_regions():
    plain, scaled = frequencies(64, 5e5, None), frequencies(64, 5e5, LLAMA_3_2)
    ratios = [b / a for a, b in zip(plain, scaled, strict=True)]
    unscaled, divided = ratios.count(1.0), sum(math.isclose(r, 1 / 32) for r in ratios)
    assert unscaled > 5 and divided > 5 and unscaled + divided < len(ratios)


@pytest.mark.parametrize(("channels", "base"), [(128, 1e6), (64, 5e5)])
def test_unscaled_angles_are_hugging_faces_bit_for_bit(channels, base):
    """transformers: inv_freq = 1 / base^(arange(0, d, 2) / d), freqs = inv_freq @ position, all in float32."""
    inverse_frequency = 1.0 / (base ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / channels))
    positions = torch.tensor(POSITIONS)
    angles = (inverse_frequency[:, None] @ positions[None, :].float()).t()
    expected = torch.cat((angles, angles), dim=-1)
    assert torch.equal(RotaryAt(channels, base, None, CPU).at(positions).view(len(POSITIONS), channels), expected)


def test_positions_are_those_given_whatever_their_order_in_the_row():
    rotary = RotaryAt(16, 1e4, None, CPU)
    positions = torch.tensor([5, 0, 1, 2, 0, 1, 5])
    actual = rotary.at(positions)
    assert torch.equal(actual, rotary.at(torch.arange(6))[positions])


def test_turned_queries_and_keys_meet_by_their_distance_alone():
    """What rotary positions are for, through Megatron-core's own rotation of the pair (i, i + d/2)."""
    rotary, g = RotaryAt(32, 1e4, None, CPU), torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=g, dtype=torch.float64)

    def score(query_at, key_at):
        turned = [
            _apply_rotary_pos_emb_bshd(x, rotary.at(torch.tensor([p])).double())
            for x, p in ((q, query_at), (k, key_at))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(107, 100) == pytest.approx(score(7, 0), rel=1e-4)
    assert score(107, 100) != pytest.approx(score(0, 7), rel=1e-2)
    by_hand = sum(
        (q[..., i] * k[..., i] + q[..., i + 16] * k[..., i + 16]).item() * math.cos(7 * f)
        + (q[..., i] * k[..., i + 16] - q[..., i + 16] * k[..., i]).item() * math.sin(7 * f)
        for i, f in enumerate(frequencies(32, 1e4, None))
    )
    assert score(7, 0) == pytest.approx(by_hand, rel=1e-5)
