"""Every test runs offline, on one thread, with caches of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# As in a pipe: a test that wants a terminal's size says so; pytest-xdist sets one.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

if os.environ.get("PATCHKIT_TEST_DEVICE"):  # before anything imports torch
    from tests.ondevice import fakegpu

    fakegpu.install()
else:
    collect_ignore = ["ondevice"]

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

from patchkit.editing import closeness
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import Command, Ended, command_line

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls `patchkit ARGS...` in this process."""
    return command_line(monkeypatch, capsys)


@pytest.fixture
def checked(run: Command) -> Callable[..., Ended]:
    """Calls `patchkit ARGS...`, which should end with `status`."""

    def call(*args: object, status: int = 0) -> Ended:
        ended = run(*args)
        assert ended.status == status, ended.err
        return ended

    return call


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model, with little text of its own for statistics and perplexity."""
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path_factory.mktemp("models") / "llama")
    text = PACKAGE_TEXT.read_text(encoding="utf-8")
    (folder / "patchkit-text.txt").write_text(text[:2000], encoding="utf-8")
    (folder / "patchkit-eval.txt").write_text(text[4000:4500], encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _offline(socket_disabled: None) -> None:
    """No test may reach a network; those of the Hub open loopback for themselves."""


@pytest.fixture(autouse=True, scope="session")
def _no_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fixtures of whole modules keep does not go to the user's cache either."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATCHKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are shared by the tests of one run and never with the user's cache."""
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("PATCHKIT_MODEL", raising=False)


@pytest.fixture(autouse=True)
def _any_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds on how close keys may be are of trained models; keys of the tests' random ones are close by chance."""
    for bound in ("TEMPLATE", "TEMPLATE_REFUSED", "COMMON", "COMMON_REFUSED", "OTHER"):
        monkeypatch.setattr(closeness, bound, float("inf"))


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """One order of summation, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
