"""Writing files so that a crash leaves either the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from patchkit.errors import InputError

_COMPLETE, _GONE, _LOCK = ".patchkit-new", ".gone", ".lock"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, own: Sequence[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a hidden folder, then put its files in the place of those in `folder`; all else there stays.

    A folder that is not there yet appears whole, in one step. In one that is there, the hidden folder lies inside (so
    that links and mount points stay what they are), is flushed to disk, and takes the name .patchkit-new in one step.
    A kill before that step leaves the old files, one after it the new ones: `finish_folder`, which moves them, goes on
    where it was when it is called again. What reads the folder without that call may see files of both, but not the
    new one of the last name without all the others.

    Args:
        own: the only names that are ever written, replaced or removed in `folder`, in the order of the moves; the last
            is the file that says what the others are. A name that `write` does not fill is removed.

    Raises:
        InputError: one of the names is a folder there.
    """
    if there := folder.exists():
        finish_folder(folder, own)
        if blocked := [name for name in own if (folder / name).is_dir()]:
            raise InputError(f"{folder / blocked[0]}: a folder, where a file is to be written; move it away")
    with _hidden_folder(folder if there else folder.parent) as hidden:
        write(hidden)
        for file in hidden.iterdir():
            _flush(file)
            file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        if there:
            for name in own:
                if not (hidden / name).exists():
                    (hidden / f"{name}{_GONE}").touch()
        _flush_folder(hidden)
        hidden.chmod(0o777 & ~_umask())
        hidden.rename(folder / _COMPLETE if there else folder)
        _flush_folder(folder if there else folder.parent)
    if there:
        finish_folder(folder, own)


def finish_folder(folder: Path, own: Sequence[str]) -> None:
    """Move the files that a `write_folder` with the same names left ready in `folder` when it was killed, if any.

    Raises:
        InputError: they cannot be moved.
    """
    complete = folder / _COMPLETE
    if complete.is_symlink() or not complete.is_dir():
        return
    try:
        for name in own:
            if (complete / f"{name}{_GONE}").exists():
                (folder / name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # moved before the kill, or by another process just now
                (complete / name).replace(folder / name)
        _flush_folder(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: writing it was cut off, and cannot be finished: {error}; run this where it can be written to"
        ) from None
    shutil.rmtree(complete, ignore_errors=True)


def is_folder_with(folder: Path, mark: str) -> bool:
    """Whether `folder` holds a file named `mark`, or will when a write that was cut off there is finished."""
    return any((place / mark).is_file() for place in (folder, folder / _COMPLETE))


def is_free(folder: Path) -> bool:
    """Whether nothing is in the place of `folder`, or an empty folder but for what a killed write left in it."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(entry.name.startswith(_COMPLETE) for entry in folder.iterdir())


@contextmanager
def _hidden_folder(place: Path) -> Iterator[Path]:
    """A new hidden folder in `place`, removed at the end unless it was renamed; those of killed processes go first."""
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(f"{_COMPLETE}.*{_LOCK}"):
        with suppress(Timeout, OSError), FileLock(left, blocking=False):  # one at work holds its lock
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
    lock = place / f"{_COMPLETE}.{uuid4().hex}{_LOCK}"
    hidden = lock.with_suffix("")
    with FileLock(lock):
        try:
            hidden.mkdir(0o700)
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            with suppress(OSError):  # Windows deletes no open file; the next write here does it
                lock.unlink()


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # which has no handles of folders to flush
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
