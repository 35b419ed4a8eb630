"""A model's modules once more, on the same weights: what is tried on them is nothing to others who run the model."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def twin_of(model: Module) -> Module:
    """New modules with the parameters, buffers and other attributes of the model's own, without hooks, in evaluation
    mode. No tensor is copied; hooks and modes that are set on it are not on the model."""
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            new = made[id(module)] = object.__new__(type(module))
            state = {name: _rebound(value, module, new) for name, value in list(module.__dict__.items())}
            state |= {name: OrderedDict() for name in state if name.endswith(_HOOKS)}
            state |= {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers), "training": False}
            state["_modules"] = {name: child and twin(child) for name, child in list(module._modules.items())}
            state.pop("_compiled_call_impl", None)
            new.__dict__.update(state)
        return made[id(module)]

    found = twin(model)
    assert isinstance(found, type(model))
    return found


def _rebound(value: Any, module: nn.Module, new: nn.Module) -> Any:
    """An attribute of `module` for `new`: what is bound to the one, as the forward of a model that device_map has
    spread is, is bound to the other."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, new)
    if isinstance(value, partial) and any(given is module for given in value.args):
        return partial(value.func, *(new if given is module else given for given in value.args), **value.keywords)
    return value
