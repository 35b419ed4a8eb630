"""Threads run the model while patches come and go: every answer is one model's. What is interrupted changes nothing.

Answers are compared bit for bit with those of a model that nobody else touches.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import patchkit
from patchkit import Patch
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.patch.stack import PatchStack
from tests import zoo
from tests.benchmarks.attach_overhead import random_patch
from tests.test_runtime import trace

TOKENS = torch.arange(4, 24)[None]  # (1, 20)
ASK = {"input_ids": TOKENS[:, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}


def patch_for(model: PreTrainedModel, layers: tuple[int, ...] = (0, 1, 2, 3), seed: int = 0) -> Patch:
    return random_patch(model, layers, 3, seed, size=0.5)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def generated(model: Any) -> Tensor:
    result: Tensor = model.generate(**ASK, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return result


class Server:
    """Threads that ask a model, and count which of the known answers they get."""

    def __init__(self, model: PreTrainedModel, ask: Callable[[Any], Tensor], known: dict[str, Tensor]) -> None:
        self.model, self.ask, self.known = model, ask, known
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self.stop = threading.Event()

    def serve(self) -> None:
        while not self.stop.is_set():
            try:
                answer = self.ask(self.model)
            except BaseException as error:
                self.errors.append(error)
                return
            names = [name for name, known in self.known.items() if torch.equal(answer, known)]
            self.counts[names[0] if names else "torn"] += 1

    @contextmanager
    def running(self, threads: int = 8) -> Iterator[None]:
        often = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # as if there were more cores
        workers = [threading.Thread(target=self.serve) for _ in range(threads)]
        try:
            for worker in workers:
                worker.start()
            yield
        finally:
            self.stop.set()
            for worker in workers:
                worker.join()
            sys.setswitchinterval(often)
        assert not self.errors
        assert not self.counts["torn"], self.counts


def slowed(model: PreTrainedModel) -> PreTrainedModel:
    """With moments between its layers in which other threads get their turn."""
    for layer in inspect_model(model).layers:
        layer.register_forward_hook(lambda *_: time.sleep(0.0002))
    return model


@pytest.mark.parametrize("ask", [logits, generated])
def test_answers_of_eight_threads_are_each_of_one_model(ask: Callable[[Any], Tensor]) -> None:
    model = slowed(zoo.FAMILIES["llama"]())
    patch = patch_for(model)
    base, before = ask(model), trace(model)
    with patch.attached(model):
        patched = ask(model)
    server = Server(model, ask, {"base": base, "patched": patched})
    rounds = 25 if ask is logits else 8
    with server.running():
        for _ in range(rounds):
            with patch.attached(model):
                assert torch.equal(ask(model), patched)
            assert torch.equal(ask(model), base)
    assert min(server.counts["base"], server.counts["patched"]) > 2
    assert trace(model) == before


def test_every_way_to_change_the_patches_leaves_answers_whole() -> None:
    model = slowed(zoo.FAMILIES["gpt2"]())
    first, second = patch_for(model, (0, 2)), patch_for(model, (1, 2, 3), 1)
    known = {"base": logits(model)}
    stack = patchkit.load(model, first, "first")
    known["first"] = logits(model)
    stack.load(second, "second")
    known["both"] = logits(model)
    stack.set_active("second")
    known["second"] = logits(model)
    stack.set_active(["second", "first"])
    known["the other way round"] = logits(model)
    stack.set_active(["first", "second"])
    server = Server(model, logits, known)
    with server.running(4):
        for _ in range(10):
            with stack.disable():
                assert torch.equal(logits(model), known["base"])
            stack.set_active("second")
            stack.delete("first")
            stack.load(first, "first")
            assert torch.equal(logits(model), known["the other way round"])
            stack.unload()
            stack = patchkit.load(model, first, "first")
            stack.load(second, "second")
            assert torch.equal(logits(model), known["both"])
    assert server.counts["both"]


def test_two_threads_attach_two_patches_to_one_model() -> None:
    model = zoo.FAMILIES["llama"]()
    patches, base, before = [patch_for(model), patch_for(model, seed=1)], logits(model), trace(model)

    def come_and_go(patch: Patch) -> None:
        for _ in range(30):
            with patch.attached(model):
                logits(model)

    threads = [threading.Thread(target=come_and_go, args=(patch,)) for patch in patches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(logits(model), base)
    assert trace(model) == before


def test_inspecting_editing_and_reading_a_model_is_nothing_to_who_runs_it() -> None:
    model = slowed(zoo.FAMILIES["llama"]())
    server = Server(model, logits, {"base": logits(model)})
    fact = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
    with server.running(4):
        for _ in range(5):
            runner = LayerRunner(inspect_model(model))
            runner.run({"input_ids": TOKENS, "use_cache": False}, stop=2)
        patchkit.apply(
            model, zoo.tiny_tokenizer(), [fact], "rome", overrides=("contexts=1", "value.steps=3", "layers=1")
        )
    assert server.counts["base"]


# --- interrupted ------------------------------------------------------------------------------------------------------


class Cut(KeyboardInterrupt):
    """What comes at any moment."""


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raises Cut before the `line`-th line of patchkit's that runs inside the block."""
    left = iter(range(line))

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if "/patchkit/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line" and next(left, None) is None:
            sys.settrace(None)
            raise Cut
        return step

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(None)


ACTIONS: dict[str, Callable[[PatchStack, Patch], object]] = {
    "load": lambda stack, patch: stack.load(patch, "new"),
    "merged": lambda stack, patch: stack.load(patch, "new", merged=True),
    "merge": lambda stack, patch: stack.merge(),
    "switch": lambda stack, patch: stack.set_active([]),
    "delete": lambda stack, patch: stack.delete("old"),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_interrupted_at_any_line_is_done_wholly_or_not_at_all(action: str) -> None:
    model = zoo.FAMILIES["llama"]()
    old, new = patch_for(model, (1, 2)), patch_for(model, (2, 3), 1)

    def seen(stack: PatchStack) -> tuple[str, bytes, object]:
        return repr(stack), logits(model).numpy().tobytes(), trace(model)["tensors"]

    stack = patchkit.load(model, old, "old")
    before = seen(stack)
    ACTIONS[action](stack, new)
    after = seen(stack)
    stack.unload()
    step, lines, ended = 23 if action in ("load", "merged") else 5, 0, False
    found = []
    while not ended:
        stack = patchkit.load(model, old, "old")
        try:
            with interrupted_at(lines):
                ACTIONS[action](stack, new)
            ended = True
        except Cut:
            found.append(seen(stack) == after)
            assert found[-1] or seen(stack) == before, lines
        stack.unload()
        lines += step
    assert found.count(False) > 5
    assert found == sorted(found)  # nothing up to some line, all of it after that
    assert not any(module._forward_hooks for module in model.modules())


def test_a_block_that_is_interrupted_while_it_begins_leaves_no_patch() -> None:
    model = zoo.FAMILIES["llama"]()
    patch, base, before = patch_for(model, (1,)), logits(model), trace(model)
    lines, entered = 0, False
    while not entered:
        try:
            with interrupted_at(lines), patch.attached(model):
                sys.settrace(None)
                entered = True
        except Cut:
            pass
        assert torch.equal(logits(model), base), lines
        assert trace(model) == before
        lines += 17


def test_running_out_of_memory_half_way_takes_the_first_half_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.FAMILIES["llama"]()
    patch, base, before = patch_for(model), logits(model), trace(model)
    seen: Sequence[int] = iter(range(2))  # type: ignore[assignment]
    register = torch.nn.Module.register_forward_hook

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(seen, None) is None:  # type: ignore[call-overload]
            raise torch.OutOfMemoryError("no memory")
        return register(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", failing)
    with pytest.raises(torch.OutOfMemoryError):
        patchkit.load(model, patch)
    monkeypatch.undo()
    assert torch.equal(logits(model), base)
    assert trace(model) == before
