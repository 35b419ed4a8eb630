"""Editing methods: one file each, found by scanning this folder.

A method is a pure function `LayerProblem, config -> Update` under the `@method` decorator, with a frozen pydantic
config, the only place where its defaults are written. Earlier edits arrive as data. A
wrapper, under `@wrapper`, is a function around another method's: `memit+nas` is MEMIT inside NAS.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, create_model, model_validator
from torch import Tensor

from patchkit.errors import InputError
from patchkit.maths.covariance import Covariance, SideBySide
from patchkit.maths.linalg import Delta, PriorKeys
from patchkit.maths.updates import Update

# facts (k,) numbers of facts, start (k, d) their states, delta (k, d) -> the delta that counts (k, d)
Constraint = Callable[[Tensor, Tensor, Tensor], Tensor]
# the same -> what is added to each fact's loss (k,)
Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]
# a change of W (d_out, d_in) -> the mean loss of the batch's targets with it, and its gradient (d_out, d_in)
Loss = Callable[[Update | None], tuple[float, Tensor]]
Constant = TypeVar("Constant")


@dataclass(frozen=True)
class Beside:
    """What a method may ask for at a site beside C.

    Attributes:
        gradient: G (d_out, q), the left singular vectors of the loss's gradient on plain text, leading ones first, for
            a method that declares needs_gradients.
        curvature: B (d_out, d_out), the second moment of the loss's gradient by the site's output, token by token on
            plain text, for a method or wrapper that declares needs_curvature.
        network: tensors by name that were trained for the model beforehand, for a method that declares needs_network.
        digest: the identity of that training.
    """

    gradient: Tensor | None = None
    curvature: Tensor | None = None
    network: Mapping[str, Tensor] | None = None
    digest: str | None = None

    def on(self, device: torch.device) -> Beside:
        """All of it there."""
        return Beside(
            None if self.gradient is None else self.gradient.to(device),
            None if self.curvature is None else self.curvature.to(device),
            None if self.network is None else {name: each.to(device) for name, each in self.network.items()},
            self.digest,
        )


NOTHING = Beside()


@dataclass(frozen=True)
class LayerProblem:
    """One solve: everything a method may look at, for one site. All tensors are float64 and on one device.

    Attributes:
        keys: K (d_in, n).
        residual: R (d_out, n), this site's share of V - W K.
        covariance: C, or None for a method that declares needs_statistics=False.
        prior: the keys of earlier edits at this site.
        read_base: gives `base_weight`.
        read_earlier: gives `earlier`, None where the site has not been edited.
        beside: what the method has asked for.
        loss: for a method whose targets are "none", which gets no keys; part_losses: that of some of the facts each.
        gradient_columns: gives `prior_gradients`, None where there are none.
        sites: over how many sites the residual of a value is spread, for `constrain` and `penalty`.
        blocks: how many weights side by side W is; the rows of K are in blocks, one for each.
        constants: what `once` has computed, kept by whoever makes the site's problems.
    """

    keys: Tensor
    residual: Tensor
    covariance: Covariance | None
    prior: PriorKeys
    read_base: Callable[[], Tensor]
    read_earlier: Callable[[], Delta | None] = lambda: None
    beside: Beside = NOTHING
    loss: Loss | None = None
    part_losses: Sequence[Loss] = ()
    gradient_columns: Callable[[], tuple[Tensor, Tensor] | None] = lambda: None
    sites: int = 1
    blocks: int = 1
    constants: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, function: Callable[..., Constant], *arguments: Hashable) -> Constant:
        """`function(base_weight, *arguments)`, computed once for all solves at this site."""
        key = (function, arguments)
        if key not in self.constants:
            self.constants[key] = function(self.base_weight, *arguments)
        found: Constant = self.constants[key]
        return found

    @property
    def gradient(self) -> Tensor | None:
        """G, (d_out, q)."""
        return self.beside.gradient

    @property
    def prior_keys(self) -> Tensor:
        """Kp, (d_in, m)."""
        return self.prior.matrix

    @cached_property
    def base_weight(self) -> Tensor:
        """W of the untouched base, (d_out, d_in)."""
        return self.read_base()

    @cached_property
    def earlier(self) -> Delta:
        """All earlier edits of W as one delta, possibly of rank 0."""
        return self.read_earlier() or Delta(self.residual[:, :0], self.keys[:, :0].T)

    @cached_property
    def prior_gradients(self) -> tuple[Tensor, Tensor]:
        """Keys (d_in, m) and gradients (d_out, m) of earlier edits by methods whose targets are gradients."""
        return self.gradient_columns() or (self.keys[:, :0], self.residual[:, :0])

    @cached_property
    def weight(self) -> Tensor:
        """W as it is now, earlier edits included, (d_out, d_in)."""
        return self.base_weight + self.earlier.dense() if self.earlier.rank else self.base_weight

    def of_block(self, block: int, residual: Tensor) -> LayerProblem:
        """The problem of one of the weights side by side, for its share of the residual (d_out, n)."""
        width = len(self.keys) // self.blocks
        at = slice(block * width, (block + 1) * width)
        covariance = self.covariance.block(block) if isinstance(self.covariance, SideBySide) else None
        return LayerProblem(
            self.keys[at],
            residual,
            covariance,
            PriorKeys(self.prior.matrix[at]),
            lambda: self.base_weight[:, at],
            lambda: Delta(self.earlier.left, self.earlier.right[:, at]),
            self.beside,
            sites=self.sites,
        )

    def replace(self, **parts: Any) -> LayerProblem:
        """The same problem with some of its parts replaced."""
        return replace(self, **parts)


class MethodConfig(BaseModel):
    """Base of every method's own settings: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    aliases: ClassVar[Mapping[str, str]] = {}
    """Names that settings had in earlier recipes and patches -> their names now."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        return cls.renamed(data) if isinstance(data, Mapping) else data

    @classmethod
    def renamed(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings` under the names they have now."""
        return {cls.aliases.get(name, name): value for name, value in settings.items()}


Solve = Callable[[LayerProblem, Any], Update]


@dataclass(frozen=True)
class Method:
    """A registered method and what it declares about itself.

    Attributes:
        update: the kind of update it writes.
        one_by_one: facts are never solved for together.
        single_site: it edits one layer.
        targets: what residuals are made of: "values" optimized at the subject's last token; "gradients" of the target's
            loss at every site, with the inputs at the target's positions as keys; or "none" for a method that fits the
            loss itself.
        value_at: where values live, if not where the model's structure decides.
        spread: how a residual at the last site is shared among sites, of which k are left: in equal parts, 1/k, or by
            their root, 1/√k.
        ends_only: of the sites, only the first and the last are edited, each toward a value of its own.
        attention: values are optimized along with a second one at the attention's output, which is discarded.
        constrain, penalty: given the value site's problem (residual 0) and the config, how values are constrained and
            what is added to their loss.
        choose: given one fact's problems at the recipe's layers, in their order, the place of the one to edit, unless a
            setting choose_layer is false.
        neighbors: how many of those layers on either side of it are edited with it.
        ends: targets end with the token that ends a text, where they do not end a turn of talk.
        spends_directions: every fact uses up an output direction, so that users hear how many are left.
        block_by_block: weights side by side are solved for one by one, each for its share of the residual; what it
            does to one matrix would mix their keys.
    """

    name: str
    config: type[MethodConfig]
    solve: Solve
    paper: str
    equations: str
    summary: str
    use_when: str
    update: Literal["delta", "sparse", "full", "rotation"] = "delta"
    one_by_one: bool = False
    single_site: bool = False
    needs_statistics: bool = True
    needs_gradients: bool = False
    needs_curvature: bool = False
    needs_network: bool = False
    targets: Literal["values", "gradients", "none"] = "values"
    value_at: Literal["layer_out", "module_out"] | None = None
    spread: Literal["equal", "root"] = "equal"
    ends_only: bool = False
    attention: bool = False
    constrain: Callable[[LayerProblem, Any], Constraint] | None = None
    penalty: Callable[[LayerProblem, Any], Penalty] | None = None
    choose: Callable[[Sequence[LayerProblem], Any], int] | None = None
    neighbors: int = 0
    ends: bool = False
    spends_directions: bool = False
    block_by_block: bool = False

    @property
    def needs_subject(self) -> bool:
        """Whether a fact needs a subject, at whose last token its value goes."""
        return self.targets == "values"


@dataclass(frozen=True)
class Wrapper:
    """A wrapper of an additive method's solve; `around(problem, config, solve)` calls solve(problem) itself.

    Attributes:
        fits: it goes around methods that fit the loss by a whole matrix, and around no others.
    """

    name: str
    config: type[MethodConfig]
    around: Callable[[LayerProblem, Any, Callable[[LayerProblem], Update]], Update]
    paper: str
    equations: str
    summary: str
    use_when: str
    update: Literal["delta", "full"] = "delta"
    needs_statistics: bool = False
    needs_curvature: bool = False
    fits: bool = False


_METHODS: dict[str, Method] = {}
_WRAPPERS: dict[str, Wrapper] = {}


def method(
    name: str, *, config: type[MethodConfig], paper: str, equations: str, use_when: str, **declared: Any
) -> Callable[[Solve], Solve]:
    """Register the decorated solve under `name`; its docstring's first line becomes the summary."""

    def register(solve: Solve) -> Solve:
        summary = (solve.__doc__ or "").strip().splitlines()[0]
        _METHODS[name] = Method(name, config, solve, paper, equations, summary, use_when, **declared)
        return solve

    return register


def wrapper(
    name: str, *, config: type[MethodConfig], paper: str, equations: str, use_when: str, **declared: Any
) -> Callable[[Any], Any]:
    """Register the decorated function under `name`, as the wrapper in `method+name`."""

    def register(around: Any) -> Any:
        summary = (around.__doc__ or "").strip().splitlines()[0]
        _WRAPPERS[name] = Wrapper(name, config, around, paper, equations, summary, use_when, **declared)
        return around

    return register


@cache
def _scan() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def available() -> dict[str, Method]:
    """All methods by name, in alphabetical order."""
    _scan()
    return dict(sorted(_METHODS.items()))


def wrappers() -> dict[str, Wrapper]:
    """All wrappers by name, in alphabetical order."""
    _scan()
    return dict(sorted(_WRAPPERS.items()))


def get(name: str) -> Method:
    """The method called `name`, wrappers included: "memit+nas".

    Raises:
        InputError: there is none; the message lists those there are.
    """
    known = available()
    if name in known:  # "oedit+" is a method's whole name
        return known[name]
    inner, plus, last = name.rpartition("+")
    if not plus or not inner:
        raise InputError(f'unknown method "{name}"; choose one of: {", ".join(known)}')
    if last not in wrappers():
        raise InputError(f'unknown wrapper "{last}" in method "{name}"; choose one of: {", ".join(wrappers())}')
    return _wrapped(get(inner), wrappers()[last])


def plain_name(name: str) -> str:
    """`name` without wrappers."""
    while name not in available() and "+" in name:
        name = name.rpartition("+")[0]
    return name


def _unfit(inner: Method, around: Wrapper) -> str | None:
    """What about `inner` keeps `around` from going around it."""
    if around.fits:
        fitted = inner.targets == "none" and inner.update == "full"
        return None if fitted else "does not fit the loss by a whole matrix"
    if inner.targets == "none":
        return "has no solve"
    return "rotates the weight" if inner.update == "rotation" else None


@cache
def _wrapped(inner: Method, around: Wrapper) -> Method:
    """`inner` inside the wrapper `around`, whose settings are a section of their own under its name."""
    if what := _unfit(inner, around):
        raise InputError(f'"{inner.name}" {what}, so that "{around.name}" cannot go around it')

    def solve(problem: LayerProblem, config: Any) -> Update:
        return around.around(problem, getattr(config, around.name), lambda changed: inner.solve(changed, config))

    sections: dict[str, Any] = {around.name: (around.config, around.config())}
    name = f"{inner.config.__name__}With{around.config.__name__}"
    changed: dict[str, Any] = {"config": create_model(name, __base__=inner.config, **sections), "solve": solve}
    return replace(
        inner,
        **changed,
        name=f"{inner.name}+{around.name}",
        paper=f"{inner.paper} {around.paper}",
        equations=f"{inner.equations}; {around.name}: {around.equations}",
        summary=f"{inner.summary} {around.summary}",
        update=around.update if around.update != "delta" else inner.update,
        needs_statistics=inner.needs_statistics or around.needs_statistics,
        needs_curvature=inner.needs_curvature or around.needs_curvature,
    )
