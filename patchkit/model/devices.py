"""Where numbers are: on which device a module computes, where float64 is to be had, how something gets there.

A model may lie on one device or be spread over several, with weights offloaded to the CPU or to disk. A tensor stays
where its layer computes; what meets it from elsewhere, indices above all, is brought there by the functions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn


def home_of(module: nn.Module) -> torch.device:
    """The device that `module` computes on; its weights need not be there in between."""
    hook = getattr(module, "_hf_hook", None)  # accelerate's, which brings weights and inputs there
    wanted = getattr(hook, "execution_device", None)
    if wanted is None:
        own = next(module.parameters(), None)
        return next(module.buffers(), torch.empty(0)).device if own is None else own.device
    return torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)


@cache
def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Apple's mps and some of Intel's GPUs do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def solve_device(module: nn.Module) -> torch.device:
    """Where solves for a module's weight are made, in float64: where it computes, or the CPU if that has no float64."""
    home = home_of(module)
    return home if has_float64(home) else torch.device("cpu")


def exact(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """`tensor` in float64 on `device`, by default its own; on the CPU where that has no float64.

    It travels in its own dtype, which is at most half as large.
    """
    where = tensor.device if device is None else device
    return tensor.to(where if has_float64(where) else "cpu").double()


def sent(
    numbers: Tensor | Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers of the host on `device`. The host does not wait for CUDA to have them."""
    here = torch.as_tensor(numbers, dtype=dtype)
    return here.to(device, non_blocking=device.type == "cuda")


def at(tensor: Tensor, *index: Tensor) -> Tensor:
    """`tensor[index]`, the index tensors from whatever device."""
    return tensor[tuple(each.to(tensor.device) for each in index)]
