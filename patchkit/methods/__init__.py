"""Editing methods: one file each, found by scanning this folder.

A method is a pure function `LayerProblem, config -> Delta` under the `@method` decorator, with a frozen pydantic
config whose defaults are the only place a default is written. What earlier edits left behind arrives as data.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from patchkit.errors import InputError
from patchkit.linalg import Covariance, Delta


@dataclass(frozen=True)
class LayerProblem:
    """Everything a method may look at, for one site. Maths dtype: float64 on the CPU."""

    weight: Tensor  # W (d_out, d_in) of the untouched base
    keys: Tensor  # K (d_in, n)
    residual: Tensor  # R (d_out, n), this site's share of V - W K
    covariance: Covariance | None  # C, or None for a method that declares needs_statistics=False
    prior_keys: Tensor  # Kp (d_in, m), keys of earlier edits at this site


class MethodConfig(BaseModel):
    """Base of every method's own settings: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Method:
    """A registered method and what it declares about itself."""

    name: str
    config: type[MethodConfig]
    solve: Callable[[LayerProblem, Any], Delta]
    paper: str
    equations: str
    summary: str
    use_when: str
    update: Literal["delta", "rotation"] = "delta"
    one_by_one: bool = False
    single_site: bool = False
    needs_statistics: bool = True


_REGISTRY: dict[str, Method] = {}


def method(
    name: str, *, config: type[MethodConfig], paper: str, equations: str, use_when: str, **declared: Any
) -> Callable[[Callable[[LayerProblem, Any], Delta]], Callable[[LayerProblem, Any], Delta]]:
    """Register the decorated solve under `name`; its docstring's first line becomes the summary."""

    def register(solve: Callable[[LayerProblem, Any], Delta]) -> Callable[[LayerProblem, Any], Delta]:
        summary = (solve.__doc__ or "").strip().splitlines()[0]
        _REGISTRY[name] = Method(name, config, solve, paper, equations, summary, use_when, **declared)
        return solve

    return register


@cache
def available() -> dict[str, Method]:
    """All methods by name, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    known = available()
    if name not in known:
        raise InputError(f'unknown method "{name}"; choose one of: {", ".join(known)}')
    return known[name]
