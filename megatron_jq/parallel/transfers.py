"""F2: send small tensors from the host to the device, without waiting."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on `device` of a tensor of the host.

    On CUDA it goes through pinned memory: a copy from ordinary memory would first wait for all that the device has
    still to do, and the device would then stand idle until the host has caught up.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
