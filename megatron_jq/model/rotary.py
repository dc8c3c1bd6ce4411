"""F3: rotary position embedding whose positions are given token by token."""

import math

import torch
from torch import Tensor

from megatron_jq.architecture import RopeScaling


class RotaryAt(torch.nn.Module):
    """Angles [T, 1, 1, d] for positions [T], in the half-split layout that Megatron-core and Hugging Face share.

    channels: d, per head; base: θ of RoPE. scaling: Llama 3.x's piecewise frequency scaling, or None. Frequencies and
    angles are float32, as in Hugging Face's models; they are not parameters and not in checkpoints.
    """

    def __init__(self, channels: int, base: float, scaling: RopeScaling | None, device: torch.device):
        super().__init__()
        exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        self.inverse_frequency = 1.0 / (base**exponent)
        if scaling is not None:
            self.inverse_frequency = _llama3_scaled(self.inverse_frequency, scaling)

    def at(self, position_T: Tensor) -> Tensor:
        angle_Td = position_T.float()[:, None] * self.inverse_frequency[None, :]
        return torch.cat((angle_Td, angle_Td), dim=-1)[:, None, None, :]


def _llama3_scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / frequency
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * frequency / scaling.factor + blend * frequency
    scaled = torch.where(wavelength > context / low, frequency / scaling.factor, blended)
    return torch.where(wavelength < context / high, frequency, scaled)
