"""Nothing is lost: a folder is replaced whole or not at all, by one command at a time, and what is cut off goes on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from patchkit import InputError, Patch
from patchkit.io.files import write_folder
from patchkit.patch.patch import OWN_FILES
from tests import zoo
from tests.helpers import Command, Ended, edited_fact, random_patch, tree, write_facts

QUICK = [part for setting in ("layers=1-2", "contexts=1", "value.steps=4") for part in ("--set", setting)]
NAMES = ("Rome", "Florence", "Ada Lovelace", "Marie Curie")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
quiet_forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with texts of its own."""
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path_factory.mktemp("base") / "model")
    for kind in ("text", "eval"):
        (folder / f"patchkit-{kind}.txt").write_text("The city is old. It has a river. People came from far. " * 40)
    return folder


@pytest.fixture
def call(run: Command, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Calls `patchkit ARGS...` in an empty folder, for the tiny checkpoint; one.jsonl to four.jsonl have one fact."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHKIT_MODEL", str(base))
    for number, name in zip(("one", "two", "three", "four"), NAMES, strict=True):
        fact = {"id": number, "prompt": f"the city of {name}", "subject": name, "target_new": "capital"}
        write_facts(f"{number}.jsonl", fact)
    return run


def made(model: PreTrainedModel, folder: Path, count: int = 1) -> Patch:
    """A patch in `folder` that cost nothing."""
    facts = [edited_fact(id=f"f{number}") for number in range(count)]
    patch = random_patch(model, "base", facts, ranks={1: count})
    patch.save(folder)
    return patch


def forked(work: Callable[[], object]) -> int:
    """Start `work` in a process of its own, whose exit status is 0 if it came to its end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(status)


def status_of(process: int) -> int:
    """How a forked process ended: its exit status, or less than 0 the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def cut_off(patch: Patch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a kill leaves that comes just after the step that makes the new files the valid ones."""
    with monkeypatch.context() as broken:
        broken.setattr("patchkit.io.files.finish_folder", lambda folder: None)
        patch.save(folder)


# --- leftovers, and switches that were cut off ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["show"], ["log"], ["push", "--dry-run"], ["export"], ["diff"]])
def test_any_command_finishes_a_write_that_was_cut_off(
    command: list[str], call: Command, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("p")
    random_patch_of = zoo.FAMILIES["llama"]()
    made(random_patch_of, folder)
    facts = [edited_fact(id="f0"), edited_fact(id="f1")]
    newer = random_patch(random_patch_of, str(base), facts, ranks={1: 2})
    cut_off(newer, folder, monkeypatch)
    lock = folder / ".patchkit-new.0123.lock"
    lock.touch()
    lock.with_suffix("").mkdir()
    more = {"push": ["user/name"], "export": ["--out", "a"], "diff": ["p"]}.get(command[0], [])
    ended = call(command[0], folder, *more, *command[1:])
    assert ended.status == 0, ended.err
    assert {file.name for file in folder.iterdir()} <= set(OWN_FILES)
    assert Patch.load(folder).manifest == newer.manifest


def test_an_adapter_that_was_cut_off_is_finished_by_what_publishes_it(
    call: Command, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_patch(zoo.FAMILIES["llama"](), str(base), [edited_fact()], ranks={1: 2}).save("p")
    assert call("export", "p", "--out", "a", "--rank", 1).status == 0
    with monkeypatch.context() as broken:
        broken.setattr("patchkit.io.files.finish_folder", lambda folder: None)
        assert call("export", "p", "--out", "a").status == 0
    assert call("push", "a", "user/name", "--dry-run").status == 0
    assert sorted(file.name for file in Path("a").iterdir() if file.name.startswith(".")) == []
    assert '"r": 2' in Path("a/adapter_config.json").read_text()


# --- places -----------------------------------------------------------------------------------------------------------


def test_the_longest_names_and_the_folder_itself_are_right(call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "n" * 250
    assert call("apply", "one.jsonl", *QUICK, "--quick", "--out", name).status == 0
    assert call("apply", "two.jsonl", "--onto", name, "--quick").status == 0
    merged = call("merge", name, "--out", "m" * 250)
    assert merged.status == 0, merged.err
    monkeypatch.chdir(name)
    here = call("apply", "../three.jsonl", "--onto", ".", "--quick")
    assert here.status == 0, here.err
    assert len(Patch.load(".").manifest.facts) == 3
    assert {file.name for file in Path().iterdir()} == {*OWN_FILES, "report.html"} - {"rejected.jsonl", "patch.sig"}
    too_long = call("apply", "../four.jsonl", "--out", "n" * 300)
    assert too_long.status == 2
    assert len(too_long.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["link", "here", "blocked"])
def test_places_that_cannot_be_written_are_refused_before_the_work(
    name: str, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchkit.cli.applying.apply_file", lambda *args, **options: pytest.fail("work was done"))
    monkeypatch.setattr("patchkit.cli.jobs.merge_patches", lambda *args, **options: pytest.fail("work was done"))
    made(zoo.FAMILIES["llama"](), Path("blocked"))
    Path("blocked/state.safetensors").unlink()
    Path("blocked/state.safetensors").mkdir()
    Path("link").symlink_to("nowhere")
    ended = {
        "link": lambda: call("apply", "one.jsonl", "--out", "link"),
        "here": lambda: call("apply", "one.jsonl", "--merge", "."),
        "blocked": lambda: call("apply", "one.jsonl", "--onto", "blocked"),
    }[name]()
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1


def test_folders_are_flushed_after_every_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure may leave a folder that does not list what it was renamed to."""
    flushed: list[Path] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", watched)
    for _ in range(2):  # a new folder, then one that is there
        flushed.clear()
        write_folder(tmp_path / "p", ["a", "b"], lambda into: [(into / name).write_text("x") for name in "ab"])
        assert {tmp_path, tmp_path / "p"} & set(flushed)
        assert {path.name for path in flushed} >= {"a", "b"}


# --- one at a time ----------------------------------------------------------------------------------------------------


@needs_fork
@quiet_forks
def test_two_commands_that_go_on_from_one_patch_at_once_both_count(call: Command) -> None:
    assert call("apply", "one.jsonl", *QUICK, "--quick", "--out", "p").status == 0
    jobs = [forked(lambda n=n: sys.exit(call("apply", f"{n}.jsonl", "--onto", "p", "--quick").status)) for n in NUMBERS]
    assert [status_of(job) for job in jobs] == [0, 0, 0]
    assert {fact.id for fact in Patch.load("p").manifest.facts} == {"one", "two", "three", "four"}


NUMBERS = ("two", "three", "four")


def test_a_patch_that_was_changed_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """By another user or machine, whom no lock of this one's stops."""
    model = zoo.FAMILIES["llama"]()
    first = made(model, tmp_path / "p")
    others = made(model, tmp_path / "p", 2)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="another patch by now than the one this started from; nothing was written"):
        first.save(tmp_path / "p", over=first)
    assert tree(tmp_path) == before
    assert all(torch.equal(Patch.load(tmp_path / "p").state[name], others.state[name]) for name in others.state)


def test_facts_that_were_left_out_are_written_with_the_patch(call: Command) -> None:
    with Path("one.jsonl").open("a") as file:
        file.write('{"prompt": "no subject"}\n')
    assert call("apply", "one.jsonl", *QUICK, "--quick", "--skip-bad", "--out", "p").status == 0
    assert "no subject" in Path("p/rejected.jsonl").read_text()
    assert call("apply", "two.jsonl", "--onto", "p", "--quick").status == 0
    assert not Path("p/rejected.jsonl").exists()


# --- Ctrl-C, and what runs out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6])
def test_ctrl_c_while_importing_is_one_line(seconds: float, call: Command, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, "apply", "one.jsonl"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [line for line in said.splitlines() if line and not line.startswith("model:")]
    assert [line[:13] for line in lines] == ["interrupted; "], said
    assert not list(tmp_path.glob("one-patch*"))


def test_a_library_that_makes_an_error_of_its_own_of_ctrl_c(call: Command) -> None:
    """As compiled modules do while they are imported: nothing in the error says what it came of."""
    told = subprocess.run(
        [sys.executable, "-c", SWALLOWED + STARTED, "apply", "one.jsonl"], capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (130, "interrupted; the same command goes on where it stopped\n")


SWALLOWED = """
import os, signal, sys, time

class Swallows:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "patchkit.cli.apply":
            return None
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            pass
        raise ImportError("numpy._core.multiarray failed to import")

sys.meta_path.insert(0, Swallows)
"""

STARTED = """
import patchkit.__main__ as program
print("there", flush=True)
program.main()
"""


def told(ended: Ended) -> str:
    """The one line that a command ended with, after notes and, where the terminal shows ^C, the end of its line."""
    lines = [line for line in ended.err.splitlines() if line]
    assert "Traceback" not in ended.err
    assert [line for line in lines if line.startswith(("error: ", "interrupted; "))] == lines[-1:]
    return lines[-1]


def test_ctrl_c_in_an_edit_says_how_to_go_on(call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr("patchkit.runs.execute.edit", interrupted)
        ended = call("apply", "one.jsonl", *QUICK, "--quick", "--out", "p")
    assert (ended.status, told(ended)) == (130, "interrupted; the same command goes on where it stopped")
    with monkeypatch.context() as cut:
        cut.setattr("patchkit.cli.jobs.merge_patches", interrupted)
        cut.setattr("patchkit.evaluate.gates.Gates.check", lambda *_: None)
        ended = call("apply", "one.jsonl", *QUICK, "--out", "p", "--merge", "m")
    assert told(ended) == "interrupted; the patch is finished: p; go on with `patchkit merge`"
    with monkeypatch.context() as cut:
        cut.setattr("patchkit.cli.jobs.take_out", interrupted)
        assert told(call("revert", "p", "--last", 1)) == "interrupted; run the same command again"


def masked() -> ImportError:
    """An interrupt of which a library has made another error."""
    error = ImportError("numpy could not be imported")
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "error: not enough memory: free"),
        (RuntimeError("could not create a primitive"), 1, "error: not enough memory: free"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            1,
            "error: not enough memory: free",
        ),
        (MemoryError(), 1, "error: not enough memory: free"),
        (OSError(12, "Cannot allocate memory"), 1, "error: not enough memory: free"),
        (OSError(28, "No space left on device", "p"), 1, "error: the disk is full, or a limit of it is reached: "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "error: the disk is full, or a limit"),
        (masked(), 130, "interrupted; "),
    ],
)
def test_what_runs_out_is_one_line_that_says_how_to_go_on(
    error: Exception, status: int, line: str, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("patchkit.editing.editor.requests_of", fail)
    ended = call("apply", "one.jsonl", *QUICK, "--out", "p")
    assert ended.status == status
    assert told(ended).startswith(line)
    assert told(ended).endswith("the same command goes on where it stopped")


@needs_fork
@quiet_forks
def test_a_full_disk_is_one_line_and_leaves_the_old_patch(call: Command) -> None:
    """A limit on the size of files does what a full disk does: the writing fails in the middle."""
    assert call("apply", "one.jsonl", *QUICK, "--quick", "--out", "p").status == 0
    before = tree(Path("p"))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        ended = call("revert", "p", "--fact", "one")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.exit(ended.status if told(ended).startswith("error: the disk is full") else 99)

    assert status_of(forked(limited)) == 1
    assert tree(Path("p")) == before
    assert call("revert", "p", "--fact", "one").status == 0
