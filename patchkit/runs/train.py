"""Training of MEND's network on a file of facts (arXiv 2110.11309, section 3.2), resumable to the same bits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import methods
from patchkit.editing.editor import frozen, requests_of
from patchkit.editing.gradients import TargetLoss
from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import plan
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, pad
from patchkit.facts.schema import Fact
from patchkit.methods.mend import OWN, SHARED, fresh, scaled, stepped
from patchkit.model.forward import widen
from patchkit.model.inputs import SiteInput, watching_site
from patchkit.model.weights import Site, read_weight
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import Corpus
from patchkit.statistics.networks import NetworkFile, Training

SAVE_EVERY = 30.0
"""Seconds after which the state so far is saved."""
NORMALIZED_ON = 64
"""Facts that the features' mean and deviation are taken over."""
KEPT, KEPT_TOKENS = 4, 48
"""Pieces of plain text that an edit is to leave alone in each step, and tokens in each."""
BEGIN = 0.1
"""How far an edit moves an entry of W at first, in units of W's root mean square entry."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: facts edited in all, each time from the untouched model.
        rank: of the network's two layers (1920 in the paper, whose models are wider).
        learning_rate: Adam's (1e-6 in the paper, over 100,000 steps and more).
        edit_weight: c_e, of the edit's loss beside the drift on other text.
        seed: of the network's first weights and of the order of facts.
    """

    steps: int = 1000
    rank: int = 128
    learning_rate: float = 1e-3
    edit_weight: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What came of it: mean loss of the target after an edit, nats a token, and mean drift on plain text, over the last
    tenth of the steps that were made now; None where none was left to make."""

    file: str
    steps: int
    layers: tuple[int, ...]
    edit_loss: float | None
    drift: float | None


def train(workspace: Workspace, facts: Sequence[Fact], config: EditConfig, how: TrainConfig, say: Say) -> Trained:
    """Train the network of the recipe's method for the layers that the recipe edits, and keep it beside the statistics.

    A step edits the untouched model by one fact, and takes L = c_e L_e + L_loc (section 3.2): the loss of the target
    after the prompt and after the fact's paraphrases, and KL(base ‖ edited) on plain text and on the prompts of its
    neighbors. What has been trained on the same facts goes on from there, to the weights that one longer run would
    have given.

    Raises:
        InputError: the method trains nothing, or the facts cannot be used.
    """
    if not methods.get(config.method).needs_network:
        trained = ", ".join(name for name, each in methods.available().items() if each.needs_network)
        raise InputError(f"{config.method} has no network to train; methods that have: {trained}")
    arch = workspace.runner.arch
    sites = plan(arch, config).sites
    if any(site.blocks > 1 for site in sites):
        raise InputError(f"{config.method}: networks are trained for plain feed-forward layers, not for experts")
    corpus = workspace.corpus(workspace.texts[0], chat=False)
    file = NetworkFile(workspace.stats, config.method, workspace.model, sites)
    training = _training(file, facts, config, how, corpus)
    with frozen(workspace.model):
        run = _Run(workspace, sites, facts, config, how, corpus)
        losses = run.through(file, training)
    if (earlier := file.trained()) and earlier[0] != training:
        say("a network that was trained on something else is replaced")
    file.save(training, how.steps, run.networks())
    last = losses[-max(1, how.steps // 10) :]
    edit, drift = (sum(each) / len(last) for each in zip(*last, strict=True)) if last else (None, None)
    return Trained(str(file.finished), how.steps, file.layers, edit, drift)


def _training(
    file: NetworkFile, facts: Sequence[Fact], config: EditConfig, how: TrainConfig, corpus: Corpus
) -> Training:
    whole = hashlib.sha256("\n".join(fact.model_dump_json() for fact in facts).encode()).hexdigest()
    return Training(
        method=config.method,
        model=file.model,
        dtype=file.dtype,
        layers=file.layers,
        facts=whole,
        text=corpus.digest,
        rank=how.rank,
        learning_rate=how.learning_rate,
        edit_weight=how.edit_weight,
        recipe=config.digest(),
        seed=how.seed,
    )


class _Run:
    """A training while it goes on. parameters: by name, <group>.<part>, the group being a shape or a layer."""

    def __init__(
        self,
        workspace: Workspace,
        sites: Sequence[Site],
        facts: Sequence[Fact],
        config: EditConfig,
        how: TrainConfig,
        corpus: Corpus,
    ) -> None:
        self.workspace, self.sites, self.how = workspace, sites, how
        runner, tokenizer = workspace.runner, workspace.tokenizer
        self.requests = requests_of(runner, tokenizer, facts, [""], config)
        self.others = [
            _others(fact, partial(requests_of, runner, tokenizer, contexts=[""], config=config)) for fact in facts
        ]
        self.neighbors = [[tokenizer(near.prompt)["input_ids"] for near in fact.locality[:KEPT]] for fact in facts]
        self.windows = [window[:KEPT_TOKENS] for window in corpus.windows if len(window) > 1]
        self.fixed: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        for site in sites:
            made = fresh(site.d_in, site.d_out, how.rank, how.seed)
            self.parameters |= {f"{_shape(site)}.{name}": made[name] for name in SHARED}
            self.parameters |= {f"{site.layer}.{name}": made[name] for name in OWN}
            size = read_weight(site).float().square().mean().sqrt().log() + torch.tensor(BEGIN).log()
            self.parameters[f"{site.layer}.rate"] = size.cpu()
            self.fixed |= {f"{site.layer}.{name}": made[name] for name in ("mean", "deviation")}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=how.learning_rate)

    def networks(self) -> dict[int, dict[str, Tensor]]:
        """By layer, the network as the method takes it."""
        return {site.layer: {name: each.detach() for name, each in self._network(site).items()} for site in self.sites}

    def _network(self, site: Site) -> dict[str, Tensor]:
        shared = {name: self.parameters[f"{_shape(site)}.{name}"] for name in SHARED}
        own = {name: self.parameters[f"{site.layer}.{name}"] for name in OWN}
        return shared | own | {name: self.fixed[f"{site.layer}.{name}"] for name in ("mean", "deviation")}

    def through(self, file: NetworkFile, training: Training) -> list[tuple[float, float]]:
        """All steps that are left, saving on the way; the edit's loss and the drift of each that was made here."""
        state, done = file.load_partial(training)
        if done > self.how.steps:
            state, done = {}, 0
        if done:
            self._restore(state, done)
        else:
            self._normalize()
        found, saved = list[tuple[float, float]](), time.monotonic()
        try:
            for number in range(done, self.how.steps):
                self.workspace.progress("training", number, self.how.steps)
                found.append(self._step(number))
                done = number + 1
                if time.monotonic() - saved > SAVE_EVERY:
                    file.save_partial(training, done, self._state())
                    saved = time.monotonic()
        except (KeyboardInterrupt, Exception):
            if done:
                with suppress(OSError):
                    file.save_partial(training, done, self._state())
            raise
        self.workspace.progress("training", done, self.how.steps)
        file.save_partial(training, done, self._state())
        return found

    def _step(self, number: int) -> tuple[float, float]:
        """One fact edited in the untouched model, and one step of Adam; what the edit's loss and the drift were."""
        place = _order(len(self.requests), number, self.how.seed)
        deltas = self._deltas(self.requests[place])
        edit = self._target_loss([self.requests[place], *self.others[place]], deltas)
        drift = self._drift([*self.neighbors[place], *_some(self.windows, number, self.how.seed)], deltas)
        self.optimizer.zero_grad()
        loss = self.how.edit_weight * edit + drift
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.optimizer.step()
        return float(edit.detach()), float(drift.detach())

    def _deltas(self, request: EditRequest) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, the factors of the edit that the network makes of a fact's gradient."""
        found = TargetLoss(self.workspace.runner, [request], 1).gradients(self.sites)
        with torch.enable_grad():
            return {
                site.layer: stepped(
                    self._network(site), found.keys[site.layer].float(), found.gradients[site.layer].float()
                )
                for site in self.sites
            }

    def _target_loss(self, requests: Sequence[EditRequest], deltas: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        loss = TargetLoss(self.workspace.runner, requests, len(requests))
        total = torch.zeros(())
        for group in loss.groups:
            with torch.enable_grad(), self._edited(deltas, len(group.inputs["input_ids"])):
                total = total + group.losses(self.workspace.runner).sum()
        return total / len(requests)

    def _drift(self, texts: Sequence[Sequence[int]], deltas: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """KL(base ‖ edited), the mean over all tokens."""
        runner = self.workspace.runner
        ids, mask = pad(texts, runner.device)
        inputs, real = {"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask.bool()
        with torch.no_grad():
            base = runner.run(inputs).logits
        with torch.enable_grad(), self._edited(deltas, len(ids)):
            edited = runner.run(inputs).logits
        assert base is not None
        assert edited is not None
        wanted, found = (F.log_softmax(widen(logits[real]), -1) for logits in (base, edited))
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def _edited(self, deltas: dict[int, tuple[Tensor, Tensor]], rows: int) -> ExitStack:
        """Inside the block, passes over `rows` rows have the edits."""
        stack = ExitStack()
        for site in self.sites:
            left, right = deltas[site.layer]
            stack.enter_context(watching_site(site, rows, partial(_added, left, right)))
        return stack

    def _normalize(self) -> None:
        """Take each feature's mean and deviation over the first facts' tokens."""
        seen: dict[int, list[Tensor]] = {site.layer: [] for site in self.sites}
        for request in self.requests[:NORMALIZED_ON]:
            found = TargetLoss(self.workspace.runner, [request], 1).gradients(self.sites)
            for layer, columns in seen.items():
                columns.append(torch.cat([found.keys[layer], scaled(found.gradients[layer])]).float().cpu())
        for layer, columns in seen.items():
            every = torch.cat(columns, 1)  # (d_in + d_out, tokens)
            deviation = every.std(1) if every.shape[1] > 1 else every.abs().squeeze(1)
            self.fixed[f"{layer}.mean"] = every.mean(1)
            self.fixed[f"{layer}.deviation"] = deviation.clamp_min(1e-3 * deviation.mean() + 1e-12)

    def _state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on."""
        state = {f"parameter.{name}": each.detach() for name, each in self.parameters.items()}
        state |= {f"fixed.{name}": each for name, each in self.fixed.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            state |= {f"{kind}.{name}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return state

    @torch.no_grad()
    def _restore(self, state: dict[str, Tensor], done: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"parameter.{name}"])
            moments: dict[str, Any] = {kind: state[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}
        self.fixed = {name: state[f"fixed.{name}"] for name in self.fixed}


def _added(left: Tensor, right: Tensor, keys: SiteInput, output: Tensor) -> Tensor:
    """What the edit left @ right adds at every token."""
    return (keys.through(right.to(_dtype(output))) @ left.T.to(_dtype(output))).to(output)


def _dtype(output: Tensor) -> torch.dtype:
    """That of the pass, or float32 where it is narrower."""
    return torch.promote_types(output.dtype, torch.float32)


def _others(fact: Fact, build: Callable[..., list[EditRequest]]) -> list[EditRequest]:
    """The fact's paraphrases, as requests of their own."""
    worded = [fact.model_copy(update={"prompt": text, "subject": text}) for text in fact.paraphrases[:KEPT]]
    return build(worded) if worded else []


def _order(count: int, number: int, seed: int) -> int:
    """Which fact step `number` edits: all of them in an order of each epoch's own."""
    draw = torch.Generator().manual_seed(seed + 1_000_003 * (number // count))
    return int(torch.randperm(count, generator=draw)[number % count])


def _some(windows: Sequence[Sequence[int]], number: int, seed: int) -> list[Sequence[int]]:
    """A few pieces of text, others in each step."""
    draw = torch.Generator().manual_seed(seed + 7919 * (number + 1))
    return [windows[int(place)] for place in torch.randint(len(windows), (KEPT,), generator=draw)]


def _shape(site: Site) -> str:
    return f"{site.d_out}x{site.d_in}"
