"""Models whose weights are packed into a few bits, as models of whole numbers: each what the packed weight multiplies
with. That is what an edit is made for; the packed model takes it as a patch.

Kernels of packed weights are made for inference: some have no gradient, and of those that have one, each its own. So a
model is unpacked once, where it is loaded to be edited or measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer

from patchkit.errors import InputError
from patchkit.model.weights import EDITABLE_DTYPES, is_offloaded, is_quantized, shape_of

_ROWS = 1024
"""Unit vectors that go through a packed weight at a time."""
_TOLERANCE = 0.05
"""Of what a packed weight makes of random numbers, by how much its whole numbers may miss it: kernels that round their
input to 8 bits do by a hundredth."""
_unpacked: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def quantization_of(config: Any) -> str | None:
    """The method that a model's configuration says it is quantized with, such as "awq"; None where it is not."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def ask_for_whole_numbers(config: Any) -> None:
    """Change a configuration so that transformers unpacks the weights as it reads them, where it knows how to."""
    found, method = config.quantization_config, quantization_of(config)
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(method))
    if isinstance(found, dict) and kind and "dequantize" in inspect.signature(kind).parameters:
        config.quantization_config = {**found, "dequantize": True}


def unpacked_from(model: nn.Module) -> str | None:
    """The method that a model's weights were quantized with before they were made whole numbers."""
    return _unpacked.get(model)


def quantized_with(model: nn.Module) -> str | None:
    """The method that a model's weights are quantized with, or were before they were made whole numbers."""
    return unpacked_from(model) or quantization_of(getattr(model, "config", None))


def note_unpacked(model: nn.Module, method: str) -> None:
    """Keep in mind that a model has whole numbers of what was quantized with `method`."""
    _unpacked[model] = method


@torch.no_grad()
def unpack(model: PreTrainedModel, method: str, dtype: torch.dtype) -> None:
    """Put linear layers of whole numbers in the place of those with packed weights. To be called before the model has
    run: some kernels pack their weights once more then, which transformers does not know.

    Args:
        method: as `quantization_of` has it.

    Raises:
        InputError: a packed weight is offloaded, or is not to be had as a matrix.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and type(quantizer)._dequantize is not HfQuantizer._dequantize:
        model.dequantize(dtype)
    packed = [(name, module) for name, module in model.named_modules() if _is_packed(module)]
    for name, module in packed:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, _whole(name, module, method, dtype))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and (type(weight.data) is not Tensor or weight.dtype not in EDITABLE_DTYPES):
            raise _unknown(name, model.get_submodule(name.rpartition(".")[0]), method, "is no linear layer")
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    note_unpacked(model, method)


def _is_packed(module: nn.Module) -> bool:
    own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return own and shape_of(module) is not None and is_quantized(module)


def _whole(name: str, module: nn.Module, method: str, dtype: torch.dtype) -> nn.Linear:
    """A linear layer that does what the packed one does, found by passing unit vectors through that."""
    if is_offloaded(module):
        raise InputError(f"{name}: quantized ({method}) and offloaded; leave out --device-map to edit this model")
    shape = shape_of(module)
    assert shape is not None
    run, where = _runner(name, module, method, shape[1], dtype)
    bias, whole = run(torch.zeros(1, shape[1])), torch.empty(shape, dtype=dtype, device=where)
    for first in range(0, shape[1], _ROWS):
        units = torch.zeros(min(_ROWS, shape[1] - first), shape[1])
        units[:, first:].fill_diagonal_(1)
        whole[:, first : first + _ROWS] = (run(units) - bias).T
    linear = nn.Linear(shape[1], shape[0], bool(bias.any()), device="meta")
    linear.weight = nn.Parameter(whole, requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(bias[0].to(dtype), requires_grad=False)
    tried = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(0))
    wanted = run(tried)
    if not (linear(tried.to(whole)) - wanted).norm() <= _TOLERANCE * wanted.norm():
        raise _unknown(name, module, method, "does not multiply with a matrix")
    _place_as(linear, module)
    return linear


def _runner(
    name: str, module: nn.Module, method: str, width: int, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], torch.device]:
    """What runs a packed weight on numbers of the host, in a dtype that its kernel takes, and where that is."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    where, reason = tensors[0].device, ""
    own = [each.dtype for each in tensors if each.dtype in (torch.float32, torch.float16, torch.bfloat16)]
    for kind in dict.fromkeys((*own, dtype, torch.float16, torch.bfloat16)):

        def run(x: Tensor, kind: torch.dtype = kind) -> Tensor:
            found: Tensor = module(x.to(where, kind))
            return found.to(torch.promote_types(dtype, torch.float32))

        try:
            if run(torch.zeros(1, width)).isfinite().all():
                return run, where
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = str(error).partition("\n")[0]
    raise _unknown(name, module, method, f"cannot be run here: {reason}")


def _unknown(name: str, module: nn.Module, method: str, why: str) -> InputError:
    return InputError(
        f"{name}: quantized ({method}), and its {type(module).__name__} {why}; edit the full-precision checkpoint, "
        "merge it, and quantize that"
    )


def _place_as(new: nn.Module, old: nn.Module) -> None:
    """Have accelerate bring inputs to a module that takes the place of another, where it did so there."""
    hook = getattr(old, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]

    where, back = getattr(hook, "execution_device", None), getattr(hook, "io_same_device", False)
    add_hook_to_module(new, AlignDevicesHook(execution_device=where, io_same_device=back))
