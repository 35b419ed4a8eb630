"""Steps scaled by the second moment of the whole gradient, held against the matrix that is never made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from patchkit.editing.editor import frozen
from patchkit.editing.full_steps import DAMPING, FullSteps
from patchkit.editing.value_config import ValueConfig
from patchkit.editing.values import Values, optimize
from patchkit.facts.reader import read_facts
from patchkit.facts.requests import SUBJECT, build_request
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from tests.test_values import requests_of, runner_of

EXAMPLES = Path(__file__).parents[1] / "examples"
MOMENTUM, MEMORY, STEPS, WIDTH = 0.8, 0.97, 7, 12


def plain(gradients: list[Tensor]) -> Tensor:
    """The step (d,) after gradients (d,)."""
    rows, age = torch.stack(gradients), torch.arange(len(gradients) - 1, -1, -1).double()
    memory, momentum = (decay**age / (decay**age).sum() for decay in (MEMORY, MOMENTUM))
    size, vectors = torch.linalg.eigh(rows.T @ (memory.unsqueeze(1) * rows))
    root = size.clamp_min(0).sqrt()
    damped = vectors @ torch.diag(1 / (root + DAMPING * size.sum().sqrt())) @ vectors.T
    step = damped @ (rows.T @ momentum)
    return step / step.norm().clamp_min(1)


def test_steps_are_those_of_the_whole_matrix_for_facts_that_come_and_go() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = FullSteps((2, STEPS, WIDTH), torch.zeros(1, dtype=torch.float64), MOMENTUM, MEMORY)
    seen: list[list[Tensor]] = []  # per fact its gradients, (places, d) each
    for time in range(STEPS):
        if time in (0, 2):
            steps.admit(2)
            seen += [[], []]
        if time == 4:
            steps.retire([0, 2, 3])
            seen = [seen[0], seen[2], seen[3]]
        counts = [len(each) for each in seen]
        gradient = torch.randn(len(seen), 2, WIDTH, generator=generator, dtype=torch.float64)
        for each, new in zip(seen, gradient, strict=True):
            each.append(new)
        found = steps.step(steps.meet(gradient, counts), counts)
        expected = torch.stack([torch.stack([plain([g[p] for g in each]) for p in range(2)]) for each in seen])
        assert (found - expected).norm() < 1e-9 * expected.norm()


def test_a_gradient_of_zero_is_no_step() -> None:
    steps = FullSteps((1, 2, WIDTH), torch.zeros(1), MOMENTUM, MEMORY)
    steps.admit(1)
    assert not steps.step(steps.meet(torch.zeros(1, 1, WIDTH), [0]), [0]).any()


def test_values_are_the_same_alone_and_beside_others() -> None:
    runner, requests = runner_of("llama"), requests_of()
    config = ValueConfig(steps=4, stop_loss=0.0, second_moment="full", parallel=2)
    together = optimize(runner, requests, runner.arch.sites[1], "layer_out", config)
    for i, request in enumerate(requests):
        alone = optimize(runner, [request], runner.arch.sites[1], "layer_out", config)
        assert (alone.targets[:, 0] - together.targets[:, i]).norm() < 1e-9 * alone.targets.norm()
        assert (alone.targets - alone.start).norm() > 0.05 * alone.start.norm()


def test_the_value_is_the_mean_of_the_last_ones() -> None:
    """After one step it is that step's, of full length; after two, between both."""
    runner, requests = runner_of("llama"), requests_of()[:1]

    def moved(steps: int) -> float:
        config = ValueConfig(steps=steps, stop_loss=0.0, decay=0.0, second_moment="full")
        values = optimize(runner, requests, runner.arch.sites[1], "layer_out", config)
        return float((values.targets - values.start).norm() / values.start.norm())

    rate = ValueConfig(second_moment="full").pace(turns=False).learning_rate
    assert 0.9 * rate < moved(1) < 1.1 * rate
    assert moved(1) < moved(2) < 1.6 * rate


def test_in_contexts_half_of_adams_steps_come_further() -> None:
    """Where a fact does not fit a short delta, neither gets below the loss at which it would stop."""
    loaded = load_model(str(EXAMPLES / "factworld"), "cpu")
    runner, facts = LayerRunner(inspect_model(loaded.model)), read_facts(EXAMPLES / "facts.jsonl", limit=4).facts
    contexts = ("", "It is late. ", f"{SUBJECT} is said to be")
    requests = [build_request(fact, loaded.tokenizer, contexts) for fact in facts]

    def sought(second_moment: Literal["diagonal", "full"]) -> Values:
        with frozen(loaded.model):
            config = ValueConfig(second_moment=second_moment)
            return optimize(runner, requests, runner.arch.sites[1], "layer_out", config)

    adam, full = sought("diagonal"), sought("full")
    assert full.steps.sum() <= 0.6 * adam.steps.sum()
    assert full.loss.mean() < adam.loss.mean()
