"""Two CUDA devices that are not there: what runs on a GPU, run without one, with the rules of a GPU and not its speed.

    from tests.ondevice import fakegpu
    fakegpu.install()                    # before torch is imported: it looks for devices once
    with fakegpu.counting() as seen: ...
    seen.waits, seen.where               # how often the host waited for the device, and at which lines

Tensors are plain `torch.Tensor`s that say cuda:0 or cuda:1, and every operator does what it does on the CPU. As on
CUDA, an operator whose tensors are on different devices raises RuntimeError, one without a CUDA kernel
NotImplementedError, and inside `no_float64()` a float64 tensor on the device TypeError, as with Apple's mps. A wait is
whatever makes the host stop until the device is done: reading a number, copies to the host, blocking copies from it,
indexing by masks.

Nothing is said of speed, memory, streams, fused attention or the last bits of numbers. It needs g++ and the headers
that torch brings along; the library is built once for each version of torch and kept in the user's cache, for whichever
environment has that version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import platformdirs
from filelock import FileLock

SOURCE = Path(__file__).with_name("fakegpu.cpp")
ROOT = Path(__file__).parents[2]
LINKED = ("c10", "torch_cpu")
"""Of torch's libraries those that fakegpu.cpp calls, in the order in which they are loaded."""
MEMORY = 80 * 2**30
WAIT, UPLOAD, DOWNLOAD, KERNEL = range(4)
"""The events of fakegpu.cpp, in its order."""
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64)


def missing() -> str | None:
    """Why it cannot be had here; None where it can."""
    if any((_torch() / "lib").glob("lib*_cuda.so")) or any((_torch() / "lib").glob("lib*_hip.so")):
        return "this torch has devices of its own"
    return None if shutil.which("g++") else "no g++"


@cache
def install() -> None:
    """Give this process its devices. They stay until it ends."""
    assert "torch" not in sys.modules, "torch has looked for devices already"
    library = _library()
    library.fakegpu_without_kernel("\n".join(_without_kernel()).encode())
    _stand_in_for_cuda()


def _torch() -> Path:
    found = util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


@cache
def _library() -> ctypes.CDLL:
    for part in LINKED:  # found by their names from here on, wherever this torch lies: the built library knows no place
        ctypes.CDLL(str(_torch() / "lib" / f"lib{part}.so"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(built()), ctypes.RTLD_GLOBAL)
    library.fakegpu_count.restype = library.fakegpu_bytes.restype = ctypes.c_int64
    library.fakegpu_doubles.argtypes = [ctypes.c_bool]
    return library


def built() -> Path:
    """The library, compiled where this source and this torch have not been together before."""
    made_of = SOURCE.read_bytes() + Path(__file__).read_bytes() + metadata.version("torch").encode()
    folder = Path(os.environ.get("PATCHKIT_TEST_CACHE") or platformdirs.user_cache_dir("patchkit-tests"))
    file = folder / f"fakegpu-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not file.is_file():
            unfinished = file.with_suffix(f".{os.getpid()}")
            parts = ["-Iinclude", str(SOURCE), "-Llib", *(f"-l{part}" for part in LINKED)]
            command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *parts, "-o", str(unfinished)]
            subprocess.run(command, check=True, timeout=300, cwd=_torch())
            unfinished.rename(file)
    return file


def _without_kernel() -> Iterator[str]:
    """Operators, as name.overload, that have a kernel for the CPU and none for CUDA, by torch's own list of them."""
    import torchgen
    import yaml

    listed = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    for entry in yaml.load(listed.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        keys = {key.strip() for keys in entry.get("dispatch") or () for key in keys.split(",")}
        if "CPU" in keys and not any("CUDA" in key or key.startswith("Composite") for key in keys):
            yield entry["func"].partition("(")[0]


def _stand_in_for_cuda() -> None:
    """What torch, transformers and accelerate ask of `torch.cuda` before they use a device."""
    import torch

    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device=) is made on the CPU and copied, as with CUDA
    properties = SimpleNamespace(
        name="fake GPU", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, is_integrated=False
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 2,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    nothing = ("_lazy_init", "set_rng_state", "manual_seed", "manual_seed_all", "empty_cache", "synchronize")
    for name, answer in {**answers, **dict.fromkeys((*nothing, "reset_peak_memory_stats"))}.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **options: _answer)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.cuda._initialized = True  # type: ignore[attr-defined]


# --- looking on -------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What happened on the devices inside `counting`: how often, how many bytes, and where.

    where, copied: waits, and bytes that crossed the bus either way, by what did so and the package's innermost line.
    """

    waits: int = 0
    kernels: int = 0
    uploaded: int = 0
    downloaded: int = 0
    where: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)


@contextmanager
def counting() -> Iterator[Seen]:
    """Count inside the block. Blocks do not nest."""
    seen, library = Seen(), _library()

    def note(event: int, op: bytes, size: int) -> None:
        place = f"{op.decode()}: {_place(sys._getframe(1))}"
        if event == WAIT:
            seen.where[place] += 1
        else:
            seen.copied[place] += size

    listener = _LISTENER(note)
    before = _state(library)
    library.fakegpu_listen(listener)
    try:
        yield seen
    finally:
        library.fakegpu_listen(None)
        after = _state(library)
        seen.waits, seen.kernels, seen.uploaded, seen.downloaded = (b - a for a, b in zip(before, after, strict=True))


def waits() -> int:
    """How often the host has waited so far."""
    return int(_library().fakegpu_count(WAIT))


def _state(library: ctypes.CDLL) -> tuple[int, ...]:
    counts, sizes = library.fakegpu_count, library.fakegpu_bytes
    return counts(WAIT), counts(KERNEL), sizes(UPLOAD), sizes(DOWNLOAD)


def _place(frame: FrameType | None) -> str:
    """The innermost line of the package, or else whose it is."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if ROOT / "patchkit" in file.parents:
            return f"{file.relative_to(ROOT / 'patchkit')}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"


@contextmanager
def no_float64() -> Iterator[None]:
    """Inside the block the devices have no float64, as Apple's mps has none."""
    _library().fakegpu_doubles(False)
    try:
        yield
    finally:
        _library().fakegpu_doubles(True)
