"""Every command killed at steps on the file system and at any time: the old patch stays whole, the same command ends in
the same tensors, and nothing is left lying about.

Commands run in forks of this process, which has imported what they need. Seeds are fixed; a kill by the clock hits
another line each time all the same.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import patchkit.export.merge
import patchkit.export.publish  # noqa: F401
from patchkit import Patch
from patchkit.cli import main
from patchkit.export import formats  # noqa: F401
from patchkit.io.places import cache_folder
from tests import zoo
from tests.helpers import write_facts
from tests.hub_server import Hub, reachable

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
FEW, MANY = 2, 32
"""Kills of each command, half of them at a step on the file system, half by the clock."""
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link"}
DONE = ("there is a patch already", "took it out", "is not an empty folder")
"""What a command says that finds its work done, since the kill came after its last step."""
QUICK = ["--quick", "--set", "layers=1", "--set", "contexts=0", "--set", "value.steps=2", "--set", "batch_size=1"]
COMMANDS: dict[str, list[str]] = {
    "apply": ["apply", "one.jsonl", *QUICK, "--out", "new"],
    "onto": ["apply", "two.jsonl", "--onto", "p", "--quick"],
    "revert": ["revert", "p", "--fact", "Flo"],
    "stats": ["stats", "--out", "stats", "--layers", "0-2", "--text", "text.txt"],
    "merge": ["merge", "p", "--out", "merged"],
    "export": ["export", "p", "--out", "adapter"],
    "push": ["push", "p", "ada/facts", "--base", "ada/base"],
}


def forked(arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> int:
    """Start `patchkit ARGUMENTS...` in a fork, after `prepare`."""
    child = os.fork()
    if child:
        return child
    status: Any = 1
    try:
        for stream, number in (("said", 1), ("told", 2)):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["patchkit", *arguments]
        prepare()
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(process: int) -> int:
    """Its exit status, or less than 0 the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """How a command ends, and what it has to say."""
    status = ended(forked(arguments))
    return status, Path("told").read_text()


def killed_at_step(arguments: Sequence[str], step: int) -> bool:
    """Run a command, and kill it before its `step`-th step on the file system; whether it came that far."""
    seen = iter(range(step))

    def watch(name: str, _: object) -> None:
        if name in STEPS and next(seen, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return ended(forked(arguments, lambda: sys.addaudithook(watch))) == -signal.SIGKILL


def killed_after(arguments: Sequence[str], seconds: float) -> bool:
    """Run a command, and kill it after some seconds; whether it was still at work."""
    process = forked(arguments)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return ended(process) == -signal.SIGKILL


def steps_of(arguments: Sequence[str]) -> tuple[int, float]:
    """Run a command to its end: how many steps on the file system it takes, and how many seconds."""
    began = time.monotonic()

    def watch(name: str, _: object) -> None:
        if name in STEPS:
            os.write(counter, b".")

    counter = os.open("steps", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    assert ended(forked(arguments, lambda: sys.addaudithook(watch))) == 0, Path("told").read_text()
    os.close(counter)
    count = Path("steps").stat().st_size
    Path("steps").unlink()
    return count, time.monotonic() - began


@dataclass(frozen=True)
class Place:
    """A folder with a base, facts, a text, and a patch `p` with two facts, and the cache that belongs to it."""

    template: Path
    hub: Hub

    def renew(self) -> None:
        """Everything as before the command, in the current folder."""
        for entry in Path().iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(self.template, ".", dirs_exist_ok=True)
        self.hub.repos.clear()
        self.hub.lfs.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor below the folder and in the repository, but what is being written."""
        found = {}
        for file in sorted(Path().rglob("*.safetensors")):
            if not any(part.startswith((".", "cache")) for part in file.parts):
                found |= {f"{file}/{name}": tensor for name, tensor in load_file(file).items()}
        for name, repo in self.hub.repos.items():
            for file_name, content in repo.files().items():
                if file_name.endswith(".safetensors"):
                    found[f"{name}/{file_name}"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return found

    def names(self) -> set[str]:
        """Everything that lies in the folder and in what the command writes, and the journals in the cache."""
        here = {str(path) for path in Path().rglob("*") if not path.parts[0].startswith(("cache", "said", "told"))}
        return here | {str(path) for path in (cache_folder() / "journals").rglob("*.safetensors")}

    def patch_is_whole(self, wanted: Sequence[str]) -> None:
        """The patch under its name is one of those with these digests, with a state that belongs to it."""
        patch = Patch.load("p")
        assert patch.manifest.digest in wanted
        assert patch.state


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def place(template: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    work = tmp_path_factory.getbasetemp() / "kills"  # under one path for all, since caches and manifests name it
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("PATCHKIT_CACHE", str(work / "cache"))
    monkeypatch.setenv("PATCHKIT_MODEL", str(work / "base"))
    with reachable(monkeypatch, work / "hub") as hub:
        found = Place(template, hub)
        if not any(template.iterdir()):
            _fill(work)
            shutil.copytree(work, template, dirs_exist_ok=True)
        yield found


def _fill(work: Path) -> None:
    """The folder before every command."""
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    text = "The city is old. It has a river. People came from far. " * 60
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), work / "base")
    for file in (folder / "patchkit-text.txt", folder / "patchkit-eval.txt", work / "text.txt"):
        file.write_text(text)
    for name, names in (("one", ["Rome", "Florence"]), ("two", ["Ada Lovelace", "Marie Curie", "Alan Turing"])):
        facts = [{"id": n[:3], "prompt": f"the city of {n}", "subject": n, "target_new": "capital"} for n in names]
        write_facts(work / f"{name}.jsonl", *facts)
    assert run(["apply", "one.jsonl", *QUICK, "--out", "p"])[0] == 0, Path("told").read_text()
    for name in ("said", "told"):
        (work / name).unlink()


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_loses_nothing(command: str, count: int, place: Place) -> None:
    arguments, draw, told = COMMANDS[command], random.Random(count), Counter[str]()
    place.renew()
    before = Patch.load("p").manifest.digest
    steps, seconds = steps_of(arguments)
    wanted, names, after = place.tensors(), place.names(), Patch.load("p").manifest.digest
    for number in range(count):
        place.renew()
        if number % 2:
            killed = killed_after(arguments, draw.uniform(0, seconds))
        else:
            killed = killed_at_step(arguments, draw.randrange(steps))
        place.patch_is_whole([before, after])
        status, said = run(arguments)
        done = status == 2 and any(text in said for text in DONE)
        assert status == 0 or done, said
        found = place.tensors()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert place.names() == names
        told["killed" if killed else "ended before"] += 1
        told["its work was done"] += done
    print(f"\n{command}: {count} kills: {dict(told)}")
    assert told["killed"] >= count // 2
