"""A checkpoint as files: where its tensors lie, and a new folder of copies that appears only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from patchkit.errors import InputError, PatchkitError
from patchkit.io.files import flush

ADAPTER = "adapter_config.json"
"""By this file PEFT, and transformers with it, tell that a folder holds an adapter."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_HEADER = 100_000_000
"""Bytes of a safetensors file's header, as in its own library."""
_UNFINISHED, _LOCK = ".unfinished", ".lock"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `size` bytes from `start` on, row-major."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The tensor, copied: a memory-mapped one would count as memory in use, and change when the file does."""
        if not self.size:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        buffer = bytearray(self.size)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(memoryview(buffer), file.readinto, self.file)
        return torch.frombuffer(buffer, dtype=DTYPES[self.dtype]).view(self.shape)

    def slice(self, number: int) -> StoredTensor:
        """One of the tensors that it is a stack of, by the first dimension."""
        size = self.size // self.shape[0]
        return StoredTensor(self.file, self.dtype, self.shape[1:], self.start + number * size, size)

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """Its bytes, `size` at a time.

        Raises:
            InputError: the file ends too early.
        """
        with self.file.open("rb") as file:
            file.seek(self.start)
            for start in range(0, self.size, size):
                wanted = min(size, self.size - start)
                chunk = file.read(wanted)
                if len(chunk) < wanted:
                    raise InputError(f"{self.file}: ends too early; get it again")
                yield chunk

    def overwrite(self, tensor: Tensor, file: Path) -> None:
        """Put `tensor`, of this dtype and shape, in this one's place in `file`, a copy of the file it is in; what then
        is there is read back and compared.

        Raises:
            PatchkitError: it is not what was written.
        """
        whole = tensor.view(-1).view(torch.uint8).numpy().data
        with file.open("r+b", buffering=0) as out:
            out.seek(self.start)
            view = whole
            while view:
                view = view[out.write(view) :]
        at = 0
        for chunk in replace(self, file=file).chunks():
            if whole[at : at + len(chunk)] != chunk:
                raise PatchkitError(f"{file}: byte {self.start + at:,} and on are not what was written; check the disk")
            at += len(chunk)


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
    if Path(name).is_file():
        advice = "merge into it with --format gguf" if name.endswith(".gguf") else "give a checkpoint's folder"
        raise InputError(f"base {name}: a file, and no folder with safetensors files; {advice}")
    found = None
    if name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    if not isinstance(found, str):
        fetch = f"hf download {name}{f' --revision {commit}' if commit else ''}"
        raise InputError(f"base {name}: no such folder, nor in the Hub's local cache; if it is on the Hub: `{fetch}`")
    return Path(found).parent


def refuse_adapter(name: str, folder: Path) -> None:
    """Refuse a model's folder that also holds a LoRA, which transformers would load with the model without a word.

    An edit of the two together could not be merged: the checkpoint's weights do not have the adapter in them.

    Raises:
        InputError: there is an adapter; the message says how to get a base without it.
    """
    if not (folder / ADAPTER).is_file():
        return
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model {name}: a LoRA adapter and no model; give its base, or the two merged with PEFT's merge_and_unload"
        )
    raise InputError(
        f"model {name}: it also holds a LoRA adapter ({ADAPTER}), which transformers would load with it; move the "
        "adapter's files out of the folder, or merge it first with PEFT's merge_and_unload"
    )


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
            outside = next((name for name in names if not _is_inside(name)), None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{index}: not an index of safetensors files; get the checkpoint again") from None
        if outside is not None:
            raise InputError(f"{index}: names {outside!r}, which is outside of the folder; do not use this checkpoint")
        if missing := next((name for name in names if not (folder / name).is_file()), None):
            raise InputError(f"{folder}: {missing}, which the index names, is missing; get the checkpoint again")
        return [folder / name for name in names]
    files = [single] if single.is_file() else sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        raise InputError(f"{folder}: no safetensors files; convert the checkpoint with save_pretrained first")
    return files


def _is_inside(name: str) -> bool:
    """Whether a file's name in an index stays in its folder, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (".." in parts or name.startswith("/") or set(name) & set("\\:\0"))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: eight bytes of length, that much JSON, then the bytes it describes.

    Raises:
        InputError: it is none, or not whole.
    """
    entries, start = _header(path)
    entries.pop("__metadata__", None)
    try:
        spans = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()}
        _check_spans(list(spans.values()), path.stat().st_size - start)
        return {name: StoredTensor(path, d, s, start + a, b - a) for name, (d, s, a, b) in spans.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a whole safetensors file; get it again") from None


def _check_spans(spans: Sequence[tuple[Any, ...]], size: int) -> None:
    """Raises ValueError where (dtype, shape, first, end) of tensors in `size` bytes cannot all be true."""
    before = 0
    for dtype, shape, first, end in sorted(spans, key=lambda span: (span[2], span[3])):
        if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
            raise ValueError("not numbers of bytes")
        if not before <= first <= end <= size:
            raise ValueError("tensors overlap, or end after the file")
        if dtype in DTYPES and end - first != prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError("a shape and its bytes do not match")
        before = end


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file keeps beside its tensors, by key.

    Raises:
        InputError: as `read_header`.
    """
    entries, _ = _header(path)
    return {str(key): str(value) for key, value in (entries.get("__metadata__") or {}).items()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the beginning of a safetensors file, and where the bytes that it describes start."""
    try:
        if not path.is_file():  # opening a pipe would wait for somebody to write into it
            raise ValueError
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(path.stat().st_size, _MOST_HEADER):
                raise ValueError
            entries: dict[str, Any] = dict(json.loads(file.read(length)))
    except (OSError, ValueError, TypeError, RecursionError):
        raise InputError(f"{path}: not a whole safetensors file; get it again") from None
    return entries, 8 + length


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder`, relative to it, but what is hidden: locks, download caches, version control.

    Raises:
        InputError: there is a pipe or device, or a link that leads out of the folder (`leads_out`).
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or (path.is_dir() and not path.is_symlink()):
            continue
        if not path.is_file():
            raise InputError(f"{path}: neither a file nor a folder; remove it, or choose another folder")
        if leads_out(path, folder):
            raise InputError(
                f"{path}: a link to {path.resolve()}, outside of the folder; it would be copied under this name: put "
                "the file itself here"
            )
        found.append(name)
    return found


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file below `folder` is a link to what may be anybody's: not in the folder, nor in the Hub cache's
    copy of the same repository. Weights are read before they are copied, so that a link to them tells nothing else."""
    if path.resolve() == folder.resolve() / path.relative_to(folder) or path.suffix == ".safetensors":
        return False
    root = folder.resolve()
    snapshot = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    return not path.resolve().is_relative_to(root.parent.parent if snapshot else root)


@dataclass(frozen=True)
class Copy:
    """A file to copy, all but the byte ranges (start, size) in `holes`, which somebody else writes."""

    source: Path
    target: Path
    holes: Sequence[tuple[int, int]] = ()
    link: bool = False

    def prepare(self) -> None:
        """Make the target as long as it will be, so that holes can be filled at any time from now on."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("wb") as file:
            file.truncate(self.source.stat().st_size)

    def run(self) -> None:
        """Copy what is outside of the holes, and flush it to disk."""
        # A symlink leads into the Hub's cache, whose files belong to every snapshot of the repository.
        if self.link and not self.source.is_symlink():
            try:
                self.target.unlink()
                return self.target.hardlink_to(self.source)
            except OSError:  # another file system, or one without links
                self.prepare()
        with self.source.open("rb", buffering=0) as read, self.target.open("r+b", buffering=0) as write:
            at = 0
            for start, size in (*sorted(self.holes), (self.source.stat().st_size, 0)):
                _copy_range(read.fileno(), write.fileno(), at, start)
                at = start + size
            os.fsync(write.fileno())  # while other files are being copied


def _copy_range(source: int, target: int, start: int, stop: int) -> None:
    try:
        # Inside the kernel, and without copying anything on file systems that share blocks.
        while start < stop and (count := os.copy_file_range(source, target, stop - start, start, start)):
            start += count
    except (AttributeError, OSError):  # not on this system, or not between these file systems
        while start < stop and (data := os.pread(source, min(stop - start, 1 << 22), start)):
            start += os.pwrite(target, data, start)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name when the block ends well, and is gone when it does not.

    All of it is on disk before: after a power failure, too, what has the name is complete. What a killed process left
    of an earlier attempt at the same target is removed first.

    Raises:
        PatchkitError: it cannot be written.
    """
    target = target.absolute()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{_stem(target)}.", suffix=_UNFINISHED, dir=target.parent))
        with FileLock(temporary / _LOCK):
            yield temporary
            for path in temporary.rglob("*"):
                flush(path)
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o777 & ~mask)
        (temporary / _LOCK).unlink(missing_ok=True)
        flush(temporary)
        if target.exists():
            target.rmdir()  # raises where something has come into it
        temporary.rename(target)
        flush(target.parent)
    except OSError as error:
        raise PatchkitError(f"{target}: not written: {error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _stem(target: Path) -> str:
    """What names of unfinished folders for `target` begin with, short enough to have more after it."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:32]


def _remove_left(target: Path) -> None:
    """Remove unfinished folders for `target` whose process is gone; one at work holds its lock."""
    for left in target.parent.glob(f".{escape(_stem(target))}.*{_UNFINISHED}"):
        with suppress(Timeout, OSError), FileLock(left / _LOCK, blocking=False):
            shutil.rmtree(left, ignore_errors=True)
