"""A checkpoint as files: where its tensors lie, and a new folder of copies that appears only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from patchkit.errors import InputError, PatchkitError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `size` bytes from `start` on, row-major."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own: a mapped file would count as memory in use, and go on changing with it."""
        buffer = bytearray(self.size)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(memoryview(buffer), file.readinto, self.file)
        return torch.frombuffer(buffer, dtype=DTYPES[self.dtype]).view(self.shape)

    def read_last_columns(self, count: int) -> Tensor:
        """The last `count` columns of a matrix, (rows, count), without the others passing through memory."""
        rows, columns = self.shape
        width = self.size // (rows * columns)
        picked = bytearray(rows * count * width)
        with self.file.open("rb", buffering=0) as file:
            for row in range(rows):
                file.seek(self.start + ((row + 1) * columns - count) * width)
                part = memoryview(picked)[row * count * width : (row + 1) * count * width]
                _fill(part, file.readinto, self.file)
        return torch.frombuffer(picked, dtype=DTYPES[self.dtype]).view(rows, count)

    def overwrite(self, tensor: Tensor, file: Path) -> None:
        """Put `tensor`, of this dtype and shape, in this one's place in `file`, a copy of the file it is in."""
        with file.open("r+b", buffering=0) as out:
            out.seek(self.start)
            view = tensor.view(-1).view(torch.uint8).numpy().data
            while view:
                view = view[out.write(view) :]


def _fill(view: memoryview, readinto: Callable[[memoryview], int | None], path: Path) -> None:
    while view:
        count = readinto(view)
        if not count:
            raise InputError(f"{path}: ends too early; get the checkpoint again")
        view = view[count:]


def find_checkpoint(name: str, commit: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself, or the cached snapshot of a Hub repository, main's without a commit.

    Raises:
        InputError: neither is there.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    found = None
    if name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    if not isinstance(found, str):
        fetch = f"hf download {name}{f' --revision {commit}' if commit else ''}"
        raise InputError(f"base {name}: no such folder, nor in the Hub's local cache; if it is on the Hub: `{fetch}`")
    return Path(found).parent


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name: of the files its index names, else of model.safetensors, else of all.

    Raises:
        InputError: there are no safetensors files, or not all, or damaged ones.
    """
    found: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        found |= read_header(file)
    return found


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not an index of safetensors files; get the checkpoint again") from None
        if missing := next((name for name in names if not (folder / name).is_file()), None):
            raise InputError(f"{folder}: {missing}, which the index names, is missing; get the checkpoint again")
        return [folder / name for name in names]
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no safetensors files; convert the checkpoint with save_pretrained first")
    return files


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: eight bytes of length, that much JSON, then the bytes it describes.

    Raises:
        InputError: it is none, or not whole.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        spans = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a whole safetensors file; get it again") from None
    return {name: StoredTensor(path, d, s, 8 + length + a, b - a) for name, (d, s, a, b) in spans.items()}


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder`, relative to it, but what is hidden: locks, download caches, version control."""
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.parts)]


def start_copying(
    pool: Executor, names: Mapping[Path, Path], first: set[Path], linked: set[Path]
) -> dict[Path, Future[None]]:
    """Copy every file to the path `names` has for it, those in `first` before the others; returns what to wait for."""
    order = sorted(names, key=lambda path: path not in first)
    return {path: pool.submit(_copy, path, names[path], path in linked) for path in order}


def _copy(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A symlink leads into the Hub's cache, whose files belong to every snapshot of the repository.
    if link and not source.is_symlink():
        try:
            return target.hardlink_to(source)
        except OSError:  # another file system, or one without links
            pass
    with source.open("rb") as read, target.open("wb") as write:
        try:
            # Inside the kernel, and without copying anything on file systems that share blocks.
            while os.copy_file_range(read.fileno(), write.fileno(), 1 << 30):
                pass
        except (AttributeError, OSError):  # not on this system, or not between these file systems
            read.seek(0)
            write.truncate(0)
            write.seek(0)
            shutil.copyfileobj(read, write, 1 << 22)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name when the block ends well, and is gone when it does not.

    All of it is on disk before: after a power failure, too, what has the name is complete.

    Raises:
        PatchkitError: it cannot be written.
    """
    target = target.absolute()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if target.exists():
            target.rmdir()  # raises where something has come into it
        temporary.rename(target)
    except OSError as error:
        raise PatchkitError(f"{target}: not written: {error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
