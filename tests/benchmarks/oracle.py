"""The published editing procedure, plainly: what patchkit's results are compared with, and its speed measured against.

ROME (Meng et al. 2022), MEMIT (Meng et al. 2023) and AlphaEdit (Fang et al. 2025), written from the papers: one fact at
a time, every pass through the whole model, logits at every position, dense d_in x d_in systems, weights changed in
place while editing. Only what defines the task is taken from patchkit: token rows, sites, covariances and settings,
among them lengths relative to the state's norm, where published code has a number per model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from patchkit import methods
from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import Plan, plan
from patchkit.editing.value_config import ValueConfig
from patchkit.facts.requests import EditRequest, Row
from patchkit.maths.covariance import Covariance
from patchkit.methods.alphaedit import AlphaEditConfig
from patchkit.methods.memit import MemitConfig
from patchkit.methods.rome import RomeConfig
from patchkit.model.arch import Architecture, inspect_model
from patchkit.model.weights import Site, read_weight, write_weight

from .common import clock


@dataclass
class OracleResult:
    """Dense deltas (d_out, d_in) by layer, target states (d, n), Adam steps per fact, seconds by phase.

    The phase "statistics" holds what published code computes once per model and keeps: P and the inverse of C.
    """

    deltas: dict[int, Tensor]
    values: Tensor
    steps: list[int]
    seconds: dict[str, float] = field(default_factory=dict)


def oracle_edit(
    model: Any, requests: Sequence[EditRequest], config: EditConfig, covariances: Mapping[int, Covariance]
) -> OracleResult:
    """Edit `model` in place, batch after batch, and put its weights back at the end.

    Raises ValueError for more than one sweep over the layers, which no published procedure has.
    """
    if config.sweeps not in (None, 1):
        raise ValueError(f"sweeps={config.sweeps}: the published procedure goes over the layers once")
    arch = inspect_model(model)
    size = 1 if methods.get(config.method).one_by_one else config.batch_size
    with _set_aside(model, plan(arch, config).sites):
        run = _Run(arch, config, covariances)
        for start in range(0, len(requests), size):
            run.batch(requests[start : start + size])
        return OracleResult(run.deltas, torch.stack(run.values, 1), run.steps, run.seconds)


class _Run:
    """One edit under way: what has been computed so far, per layer and per fact."""

    def __init__(self, arch: Architecture, config: EditConfig, covariances: Mapping[int, Covariance]) -> None:
        self.arch, self.config, self.plan = arch, config, plan(arch, config)
        self.deltas: dict[int, Tensor] = {}
        self.prior: dict[int, Tensor] = {}
        self.values: list[Tensor] = []
        self.steps: list[int] = []
        self.seconds: dict[str, float] = {}
        self.device = read_weight(arch.sites[0]).device.type
        with self.timed("statistics"):
            self.solvers = {site.layer: _solver(config, covariances[site.layer]) for site in self.plan.sites}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = clock(self.device)
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + clock(self.device) - began

    def batch(self, requests: Sequence[EditRequest]) -> None:
        """All values, then layer by layer: every fact's key, every fact's current state, one dense solve."""
        with self.timed("values"):
            found = [optimize_value(self.arch, request, self.plan, self.config.value) for request in requests]
        targets = torch.stack([target for target, _ in found], 1).double().cpu()  # (d, n)
        for i, site in enumerate(self.plan.sites):
            with self.timed("keys"):
                keys = torch.stack([_key(self.arch, request, site) for request in requests], 1)  # (d_in, n)
                current = torch.stack([_state(self.arch, request, self.plan) for request in requests], 1)  # (d, n)
            with self.timed("solve"):
                residual = (targets - current) / (len(self.plan.sites) - i)  # (d, n), MEMIT eq. 20
                prior = self.prior.get(site.layer, keys[:, :0])  # (d_in, m)
                delta = self.solvers[site.layer](residual, keys, prior)  # (d_out, d_in)
                weight = read_weight(site)
                write_weight(site, weight + delta.to(weight))
                self.prior[site.layer] = torch.cat([prior, keys], 1)
                self.deltas[site.layer] = self.deltas.get(site.layer, 0) + delta
        self.values += [target for target, _ in found]
        self.steps += [steps for _, steps in found]


# --- values: gradient descent on the state at the subject's last token ------------------------------------------------


def optimize_value(arch: Architecture, request: EditRequest, how: Plan, config: ValueConfig) -> tuple[Tensor, int]:
    """One fact's target state (d,) and the number of Adam steps it took (ROME eq. 4).

    The drift term is taken after "{subject} is a", as in the paper.
    """
    rows = [*request.rows, request.essence]
    with torch.no_grad():
        states, logits = _watched_forward(arch, rows, how, None)
    scale = states.norm(dim=-1).median()
    base = _after_last(logits, rows)[-1].log_softmax(-1)  # (vocab,)
    delta = torch.zeros_like(states[0], requires_grad=True)  # (d,), in units of `scale`
    adam = torch.optim.Adam([delta], lr=config.pace(turns=False).learning_rate / delta.numel() ** 0.5)
    for step in range(config.pace(turns=False).steps + 1):
        _, logits = _watched_forward(arch, rows, how, delta * scale)
        target_loss = _target_loss(logits, request.rows)
        if target_loss < config.stop_loss or step == config.pace(turns=False).steps:
            break
        edited = _after_last(logits, rows)[-1].log_softmax(-1)  # (vocab,)
        drift = F.kl_div(base, edited, reduction="sum", log_target=True)
        adam.zero_grad()
        (target_loss + config.kl_weight * drift + config.decay * delta.square().sum()).backward()
        adam.step()
        with torch.no_grad():
            delta *= (config.pace(turns=False).clamp / delta.norm()).clamp_max(1)
    return (states[0] + delta * scale).detach(), step


def _watched_forward(arch: Architecture, rows: Sequence[Row], how: Plan, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """States (rows, d) at the subject before `delta` (d,) is added to them, and logits (rows, seq, vocab)."""
    site = how.sites[-1]
    subject = [row.subject for row in rows]
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        hidden = whole.reshape(len(rows), -1, whole.shape[-1])  # (rows, seq, d), which some blocks flatten
        seen.append(_wide(hidden[torch.arange(len(rows)), subject]))
        if delta is None:
            return None
        moved = hidden.clone()
        moved[torch.arange(len(rows)), subject] += delta.to(hidden.dtype)
        moved = moved.reshape(whole.shape)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    module = site.module if how.value_at == "module_out" else arch.layers[site.layer]
    with module.register_forward_hook(hook):
        logits = _forward(arch, [row.ids for row in rows])
    return seen[0], logits


def _target_loss(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """-log P of a target token, averaged over the row's target tokens and then over the rows."""
    log_probs = logits.log_softmax(-1)
    losses = [
        -torch.stack([log_probs[i, t - 1, row.ids[t]] for t in range(row.target, len(row.ids))]).mean()
        for i, row in enumerate(rows)
    ]
    return torch.stack(losses).mean()


def _after_last(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    return torch.stack([logits[i, len(row.ids) - 1] for i, row in enumerate(rows)])  # (rows, vocab)


# --- keys and current states: a pass through the whole model for each -------------------------------------------------


@torch.no_grad()
def _key(arch: Architecture, request: EditRequest, site: Site) -> Tensor:
    """What enters the site's module at the subject's last token, averaged over the contexts: (d_in,), float64."""
    seen: list[Tensor] = []
    with site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        _forward(arch, [row.ids[: row.target] for row in request.rows])
    inputs = seen[0].reshape(len(request.rows), -1, site.d_in)  # (rows, seq, d_in)
    subject = [row.subject for row in request.rows]
    return inputs[torch.arange(len(subject)), subject].double().mean(0).cpu()


@torch.no_grad()
def _state(arch: Architecture, request: EditRequest, how: Plan) -> Tensor:
    """The state that the value is to replace, after no context, as the model now is: (d,), float64."""
    return _watched_forward(arch, request.rows[:1], how, None)[0][0].double().cpu()


def _forward(arch: Architecture, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits (rows, seq, vocab) of right-padded token sequences."""
    device = read_weight(arch.sites[0]).device
    ids = pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)  # (rows, seq)
    mask = pad_sequence([torch.ones(len(s), dtype=torch.long) for s in sequences], batch_first=True)  # (rows, seq)
    return _wide(arch.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits)


def _wide(tensor: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- the dense solves -------------------------------------------------------------------------------------------------

Solve = Callable[[Tensor, Tensor, Tensor], Tensor]  # R (d_out, n), K (d_in, n), Kp (d_in, m) -> delta (d_out, d_in)


def _solver(config: EditConfig, covariance: Covariance) -> Solve:
    settings = config.method_config()
    if isinstance(settings, AlphaEditConfig):
        return dense_alphaedit(covariance, settings)
    if isinstance(settings, MemitConfig):
        return dense_memit(covariance, settings)
    if isinstance(settings, RomeConfig):
        return dense_rome(covariance, settings)
    raise ValueError(f"there is no plain implementation of {config.method}")


def dense_alphaedit(covariance: Covariance, config: AlphaEditConfig) -> Solve:
    """AlphaEdit eq. 14, literally: R K'P (Kp Kp'P + K K'P + l2 I)^-1."""
    values, vectors = covariance.eigh
    preserved = values.cumsum(0) <= config.null_energy * values.sum()
    projector = vectors[:, preserved] @ vectors[:, preserved].T  # (d_in, d_in), eq. 9
    l2 = config.ridge * values[preserved].sum()

    def solve(residual: Tensor, keys: Tensor, prior: Tensor) -> Tensor:
        system = projector @ (prior @ prior.T + keys @ keys.T) + l2 * torch.eye(len(keys), dtype=keys.dtype)
        transposed: Tensor = torch.linalg.solve(system, projector @ keys @ residual.T)  # (d_in, d_out)
        return transposed.T

    return solve


def dense_memit(covariance: Covariance, config: MemitConfig) -> Solve:
    """MEMIT eq. 14: R K'(C0 + K K')^-1, with the earlier keys in C0."""
    preserved = config.preserve * _damped(covariance, config.damping)  # (d_in, d_in)

    def solve(residual: Tensor, keys: Tensor, prior: Tensor) -> Tensor:
        system = preserved + prior @ prior.T + keys @ keys.T
        transposed: Tensor = torch.linalg.solve(system, keys @ residual.T)  # (d_in, d_out)
        return transposed.T

    return solve


def dense_rome(covariance: Covariance, config: RomeConfig) -> Solve:
    """ROME eq. 2: Λ (C^-1 k)' with Λ = (v* - W k) / (C^-1 k)'k."""
    inverse: Tensor = torch.linalg.inv(_damped(covariance, config.damping))  # (d_in, d_in)

    def solve(residual: Tensor, keys: Tensor, prior: Tensor) -> Tensor:
        direction = inverse @ keys  # (d_in, 1)
        return residual / (direction.T @ keys) @ direction.T

    return solve


def _damped(covariance: Covariance, damping: float) -> Tensor:
    matrix = covariance.matrix
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


# --- the model, during and after --------------------------------------------------------------------------------------


@contextmanager
def _set_aside(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """No gradients on weights inside; weights of `sites` and gradient flags as they were afterward, bit for bit."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _restored(sites):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


@contextmanager
def added(arch: Architecture, deltas: Mapping[int, Tensor]) -> Iterator[None]:
    """Dense deltas (d_out, d_in) by layer added to the weights in place; the weights are put back bit for bit."""
    sites = [arch.sites[layer] for layer in deltas]
    with _restored(sites):
        for site in sites:
            weight = read_weight(site)
            write_weight(site, weight + deltas[site.layer].to(weight))
        yield


@contextmanager
def _restored(sites: Sequence[Site]) -> Iterator[None]:
    saved = [read_weight(site).clone() for site in sites]
    try:
        yield
    finally:
        for site, weight in zip(sites, saved, strict=True):
            write_weight(site, weight)
