"""How much goes into one pass: what suits a kind of device, or what `patchkit autotune` measured on this one."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from patchkit.errors import InputError
from patchkit.io.files import one_at_a_time, refuse_unwritable, write_text
from patchkit.io.places import cache_folder
from patchkit.words import counted


@dataclass(frozen=True)
class Room:
    """What a device has room for.

    Attributes:
        facts: that share a step of values, where the recipe does not say.
        tokens: in a pass of such a step; beyond these, more are no faster and only take more memory.
        logits: most numbers in the logits of one.
        a_pass: tokens that take as long as it takes to begin a pass, which reads all weights and launches every kernel:
            so many more cost less than another pass.
    """

    facts: int
    tokens: int
    logits: int
    a_pass: int


ROOM = {"cpu": Room(32, 256, 2**25, 48), "cuda": Room(100, 4096, 2**27, 512)}


@dataclass(frozen=True)
class Tuned:
    """The part of a device's room that was measured: `tokens` and `a_pass` of `Room`."""

    tokens: int
    a_pass: int


def room_on(device: torch.device, model: str) -> Room:
    """A device's room for a model, by its `shape_of`."""
    usual = ROOM.get(device.type, ROOM["cpu"])
    tuned = _known().get(_key(device, model))
    return usual if tuned is None else replace(usual, **asdict(tuned))


def remember(device: torch.device, model: str, tuned: Tuned | None) -> Path:
    """Let later runs of models of this shape use it on this device; None forgets what there was. Gives the file."""
    file = check_kept()
    with one_at_a_time(file):
        known = {key: found for key, found in _known().items() if key != _key(device, model)}
        if tuned is not None:
            known[_key(device, model)] = tuned
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({key: asdict(each) for key, each in known.items()}, indent=2, ensure_ascii=False))
    return file


def check_kept() -> Path:
    """The file that later runs read.

    Raises:
        InputError: it cannot be written.
    """
    file = _file()
    refuse_unwritable(file.parent, "$PATCHKIT_CACHE: ")
    if file.is_dir():
        raise InputError(f"{file}: is a folder, and is where passes are kept that were measured; move it away")
    return file


def named(device: torch.device) -> str:
    """The device in words, with what else its speed hangs on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    if device.type != "cpu":
        return f"{device.type}, torch {torch.__version__}"
    return f"{_processor()}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"


def _file() -> Path:
    return cache_folder() / "autotune.json"


def _key(device: torch.device, model: str) -> str:
    return f"{named(device)}: {model}"


def _known() -> Mapping[str, Tuned]:
    """What was measured before; nothing where the file cannot be read, as a run does not hang on it."""
    try:
        entries = json.loads(_file().read_text(encoding="utf-8"))
        return {key: Tuned(max(1, int(each["tokens"])), max(0, int(each["a_pass"]))) for key, each in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()
