"""Two processes that do one command together: the same patch as one makes, and nothing lost where one of them is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from patchkit.cli import main
from patchkit.editing import value_log, values
from patchkit.errors import PatchkitError
from patchkit.io.places import cache_folder
from patchkit.ranks import LOST, Ranks, world
from tests.helpers import apart, tree, write_facts

NAMES = ("Rome", "Florence", "Ada Lovelace", "Marie Curie", "Alan Turing")
FACTS = [{"id": n[:3], "prompt": f"the city of {n}", "subject": n, "target_new": "capital"} for n in NAMES]
FACTS += [{"id": "aunt", "prompt": "the aunt of Rome", "subject": "Rome", "target_new": "friend"}]  # one delta for both
APPLY = ("apply", "facts.jsonl", "--layers", "1-2", "--set", "steps=4", "--quick", "--no-retry", "--no-guard")
APPLY += ("--dtype", "float64")  # float32 rounds by 1e-6 what is computed in another order
Prepare = Callable[[int], object]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHKIT_MODEL", str(small_model))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    write_facts("facts.jsonl", *FACTS)


def forked(rank: int, size: int, arguments: Sequence[object], prepare: Prepare) -> int:
    """A process that runs a command as one of several, and what it says goes to a file that all of them share."""
    child = os.fork()
    if child:
        return child
    status: Any = 1
    try:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        for stream in ("stdout", "stderr"):
            plain = open({"stdout": 1, "stderr": 2}[stream], "w", closefd=False)  # noqa: SIM115
            setattr(sys, stream, plain)
            setattr(sys, f"__{stream}__", plain)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        sys.argv = ["patchkit", *map(str, arguments)]
        prepare(rank)
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def together(*arguments: object, size: int = 2, prepare: Prepare = lambda rank: None) -> tuple[list[int], str, str]:
    """How the processes ended, less than 0 for the signal that ended one, and what they said in all."""
    for name in ("out", "err"):
        Path(name).unlink(missing_ok=True)
    # What ranks meet at is kept by another process than theirs, as torchrun has it.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["MASTER_PORT"] = str(store.port)
    children = [forked(rank, size, arguments, prepare) for rank in range(size)]
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return ended, Path("out").read_text(), Path("err").read_text()


def differences(one: str, two: str) -> Iterator[float]:
    for name in ("patch.safetensors", "state.safetensors"):
        found, expected = load_file(Path(two) / name), load_file(Path(one) / name)
        assert found.keys() == expected.keys()
        yield from (apart(found[key].double(), expected[key].double()) for key in expected)


WAYS = {
    "alphaedit": ("--batch-size", 4),
    "constrained": ("--method", "mose-right"),
    "one by one": ("--method", "rome", "--layers", 1),
    "gradients": ("--method", "oedit", "--set", "contexts=1"),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_make_the_patch_of_one(way: str, checked: Any) -> None:
    checked(*APPLY, *WAYS[way], "--out", "one", "--stats", "stats-one")
    ended, out, err = together(*APPLY, *WAYS[way], "--out", "two", "--stats", "stats-two", "--json")
    assert ended == [0, 0], err
    assert out.count("\n") == 1  # one of them says what came out
    assert max(differences("one", "two")) < 1e-6
    assert not list(Path("stats-two").rglob("partial-*"))
    assert not list((cache_folder() / "journals").rglob("*.safetensors"))


BENCH = ("bench", "--data", "facts.jsonl", "--methods", "alphaedit,memit", "--batch-size", 3)
BENCH += ("--set", "layers=1-2", "--set", "steps=4", "--quick", "--dtype", "float64")


def test_two_processes_make_the_benchmark_of_one(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first one finds the folder of a run that was cut off."""
    checked(*BENCH, "--checkpoints", "3,6", "--out", "one", "--stats", "stats-one")
    ended, out, err = together(*BENCH, "--checkpoints", 3, "--out", "two", "--stats", "stats-two")
    assert ended == [0, 0], err
    ended, out, err = together(*BENCH, "--checkpoints", "3,6", "--out", "two", "--stats", "stats-two", "--json")
    assert ended == [0, 0], err
    assert out.count("\n") == 1
    assert [(row["method"], row["edits"]) for row in json.loads(out)["rows"]] == [
        ("unedited", 0),
        ("alphaedit", 3),
        ("alphaedit", 6),
        ("memit", 3),
        ("memit", 6),
    ]
    for patch in ("alphaedit/3", "alphaedit/6", "memit/6"):
        assert max(differences(f"one/{patch}", f"two/{patch}")) < 1e-6
    write_facts("facts.jsonl", *FACTS[1:])
    ended, out, err = together(*BENCH, "--out", "two", "--stats", "stats-two")
    assert (ended, out, err.count("error:")) == ([2, 2], "", 1), err


def test_torchrun_starts_them(checked: Any) -> None:
    checked("stats", "--layers", "1-2", "--out", "one")
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "patchkit")
    called = [sys.executable, *start, "stats", "--layers", "1-2", "--out", "two"]
    done = subprocess.run(
        called, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("down_proj") == 2
    one, two = ({Path(name).name: Path(where) / name for name in tree(Path(where))} for where in ("one", "two"))
    assert one.keys() == two.keys()
    for name in (name for name in one if name.endswith(".safetensors")):
        found, expected = load_file(two[name])["second_moment"], load_file(one[name])["second_moment"]
        assert apart(found, expected) < 1e-6


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_all_with_one_line_and_the_same_command_goes_on(
    lost: int, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second batch, when the first one has been kept."""
    checked(*APPLY, "--batch-size", 2, "--out", "one")

    def killed(rank: int) -> None:
        if rank == lost:
            monkeypatch.setattr(values._Optimizer, "run", counted(values._Optimizer.run, 2))

    def counted(run: Any, last: int) -> Any:
        calls = iter(range(1, 9))

        def at_last(self: Any, advance: Any) -> Any:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(self, advance)

        return at_last

    ended, out, err = together(*APPLY, "--batch-size", 2, "--out", "two", prepare=killed)
    assert (ended[lost], ended[1 - lost]) == (-signal.SIGKILL, 1)
    assert not out
    assert [line for line in err.splitlines() if "note" not in line and "error" in line] == [f"error: {LOST}"]
    kept = [file.name for file in (cache_folder() / "journals").rglob("batch-*")]
    assert kept == ["batch-00000.safetensors"]
    ended, _, err = together(*APPLY, "--batch-size", 2, "--out", "two")
    assert ended == [0, 0], err
    assert max(differences("one", "two")) < 1e-6


def test_a_process_that_torchrun_ends_keeps_its_part_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told to end in the middle of a batch; both go on from where they were."""
    monkeypatch.setattr(value_log, "SHARE", 0)
    monkeypatch.setattr(value_log, "AT_FIRST", 0)

    def told_to_end(rank: int) -> None:
        keep = value_log.ValueLog.keep

        def keep_and_end(self: Any, *all_of_it: Any, **numbers: Any) -> None:
            keep(self, *all_of_it, **numbers)
            if numbers["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(value_log.ValueLog, "keep", keep_and_end)

    ended, out, err = together(*APPLY, "--out", "two", prepare=told_to_end)
    assert ended == [130, 130]
    assert not out
    assert [line for line in err.splitlines() if LOST in line] == [f"interrupted; {LOST}"], err
    flights = {file.name for file in (cache_folder() / "journals").rglob("flight-*")}
    assert flights == {"flight-00000-1.safetensors", "flight-00000-1-1.safetensors"}
    ended, _, err = together(*APPLY, "--out", "two")
    assert ended == [0, 0], err


def test_what_is_wrong_is_said_once(small_model: Path) -> None:
    write_facts("facts.jsonl", {**FACTS[0], "subject": "Oslo"})
    ended, out, err = together(*APPLY, "--out", "two")
    assert (ended[0], out, err.count("error:")) == (2, "", 1), err
    assert '"Oslo" is not in prompt' in err
    ended, out, err = together("verify", "p")
    assert (ended, out) == ([2, 2], "")
    assert (
        err
        == "error: torchrun: only apply, stats and bench can be shared by several processes; run verify without it\n"
    )


def test_one_process_sends_nothing() -> None:
    alone, mine = world(), {1: torch.ones(2)}
    assert (alone, alone.first) == (Ranks(), True)
    assert alone.from_first(lambda: 3) == 3
    assert alone.mapped(list, [4, 5]) == [4, 5]
    assert alone.summed(mine) == mine
    assert "torch.distributed" not in type(alone).__module__


def test_ranks_that_have_come_to_other_items_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gathered", lambda self, mine: [mine, (7, [])])
    with pytest.raises(PatchkitError, match="do not have the same facts"):
        Ranks(0, 2).mapped(list, [1, 2, 3])
