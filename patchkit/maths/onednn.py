"""Linear layers computed by oneDNN on x86 processors, in float32.

torch gives float32 products to MKL, which on AMD's processors keeps to half of their vector width; oneDNN, which torch
brings along as well, uses all of it: on a Zen 5 core 200 to 230 GFLOP/s where MKL has 100, in both directions and from
16 rows on (`python -m tests.benchmarks.products`). On Intel's, MKL has gradients. The numbers are float32's either way,
apart in their last bits.
`torch.backends.mkldnn.enabled = False` turns it off.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 8
"""Fewer are bound by reading the weights, which is all the same."""


class _Linear(torch.autograd.Function):
    """x (..., d_in) @ weight' + bias, differentiable in x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight if _by_intel() else _product(gradients[0], weight.T, None), None, None


@cache
def _by_intel() -> bool:
    """Whether Intel made the processor. MKL then multiplies by a weight that is not transposed, as gradients are, a
    fifth to a half faster than oneDNN."""
    known = Path("/proc/cpuinfo")
    told = known.read_text() if known.is_file() else platform.processor()
    return "GenuineIntel" in told


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) @ weight' (d_in, d_out) + bias, by oneDNN where that can be; differentiable."""
    learning = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if learning or not fits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _product(x, weight, bias)


class _Rounded(torch.autograd.Function):
    """x (..., d_in) @ weight' + bias with both factors of each product rounded to bfloat16, as the result is; the rest,
    and the gradient by x, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        product = _product(x.bfloat16(), weight, None).float()
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0].bfloat16(), weight.T, None).float(), None, None


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) in float32 @ weight' (d_in, d_out) in bfloat16 + bias, in float32 but for the products."""
    result: Tensor = _Rounded.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def fast_in_16_bits() -> bool:
    """Whether the processor multiplies in bfloat16, twice as fast as in float32 (AVX512-BF16, AMX)."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return available() and known is not None and bool(known())


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether it can be: in float32 on the CPU, of rows enough."""
    float32 = x.dtype == weight.dtype == torch.float32
    return float32 and x.device.type == weight.device.type == "cpu" and x[..., 0].numel() >= FEWEST_ROWS


def available() -> bool:
    """Whether this torch and processor have it, and it is not turned off."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    built_in = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return on_x86 and built_in and bool(torch.backends.mkldnn.enabled)
