"""A checkpoint whose numbers are no numbers makes every loss and every rate one of them; it is told before any work."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from patchkit.errors import InputError

_COMPARED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # quantized numbers are always finite


@torch.no_grad()
def refuse_not_finite(model: nn.Module, name: str) -> None:
    """One pass over the weights that are in memory, and one wait a device.

    Raises:
        InputError: a weight holds NaN or infinity; the message names the first such weight, and the place in it.
    """
    by_device = defaultdict[torch.device, dict[str, Tensor]](dict)
    for weight, values in model.named_parameters():
        if values.dtype in _COMPARED and values.numel() and not values.is_meta:
            by_device[values.device][weight] = torch.stack(values.aminmax()).isfinite().all()
    bad = {
        weight
        for found in by_device.values()
        for weight, finite in zip(found, torch.stack([*found.values()]).tolist(), strict=True)
        if not finite
    }
    for weight, values in model.named_parameters():
        if weight in bad:
            raise InputError(f"model {name}: {_told(weight, values)}")


def _told(weight: str, values: Tensor) -> str:
    wrong = ~values.isfinite()
    first = wrong.nonzero()[0].tolist()
    what = "not a number" if bool(values[tuple(first)].isnan()) else "infinite"
    count = int(wrong.sum())
    more = (
        f", as {'is one other value' if count == 2 else f'are {count - 1:,} other values'} of it" if count > 1 else ""
    )
    advice = "fetch the checkpoint again, or use another one"
    if values.dtype == torch.float16:
        advice = "the checkpoint may be too large for this dtype: try --dtype bfloat16 or float32"
    return f"{weight} is {what} at {first}{more}; {advice}"
