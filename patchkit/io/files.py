"""Writing files so that a crash leaves either the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from patchkit.errors import InputError
from patchkit.io.places import cache_folder

_COMPLETE, _GONE, _LOCK = ".patchkit-new", ".gone", ".lock"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file in a hidden folder beside `path`, flush it to disk, then rename it to `path`."""
    with _hidden_folder(path.parent) as hidden:
        file = hidden / path.name
        write(file)
        flush(file)
        with suppress(OSError):
            file.chmod(0o666 & ~_umask())
        file.replace(path)
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """The same with a text, as UTF-8."""

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_folder(
    folder: Path, own: Sequence[str], write: Callable[[Path], None], check: Callable[[], None] = lambda: None
) -> None:
    """Let `write` fill a hidden folder, then put its files in the place of those in `folder`; all else there stays.

    A folder that is not there yet appears whole, in one step. In one that is there, the hidden folder lies inside (so
    that links and mount points stay what they are), is flushed to disk, and takes the name .patchkit-new in one step.
    A kill before that step leaves the old files, one after it the new ones: `finish_folder`, which moves them, goes on
    where it was when it is called again. What reads the folder without that call may see files of both, but not the
    new one of the last name without all the others.

    Args:
        own: the only names that are ever written, replaced or removed in `folder`, in the order of the moves; the last
            is the file that says what the others are. A name that `write` does not fill is removed.
        check: called when all is ready, while no other process can write the folder; what it raises leaves the old
            files.

    Raises:
        InputError: one of the names is a folder there.
    """
    refuse_folders(folder, own)
    there = folder.exists()
    if there:
        finish_folder(folder)
    with _hidden_folder(folder if there else folder.parent) as hidden:
        write(hidden)
        _in_order(hidden, own, marking_missing=there)
        with _switching(folder if there else folder.parent):
            check()
            if there:
                finish_folder(folder)  # what another process has left since
            hidden.rename(folder / _COMPLETE if there else folder)
            flush(folder if there else folder.parent)
            if there:
                finish_folder(folder)


def refuse_folders(folder: Path, own: Sequence[str]) -> None:
    """Raises InputError where something that is no file has one of the names of a folder's own files."""
    if blocked := [name for name in own if (folder / name).exists() and not (folder / name).is_file()]:
        what = "a folder" if (folder / blocked[0]).is_dir() else "no plain file"
        raise InputError(f"{folder / blocked[0]}: {what}, where a file is to be written; move it away")


def _in_order(hidden: Path, own: Sequence[str], marking_missing: bool) -> None:
    """Flush what was written. For a folder that is there, number the files in the order in which they are to be moved,
    with empty ones for names that are to go."""
    for place, name in enumerate(own):
        file = hidden / name
        if file.exists():
            flush(file)
            with suppress(OSError):  # file systems without permissions; safetensors' files only their owner can read
                file.chmod(0o666 & ~_umask())
            if marking_missing:
                file.rename(hidden / f"{place:02}-{name}")
        elif marking_missing:
            (hidden / f"{place:02}-{name}{_GONE}").touch()
    flush(hidden)
    with suppress(OSError):
        hidden.chmod(0o777 & ~_umask())


def finish_folder(folder: Path) -> None:
    """Put away what killed writes left in `folder`: move the files of a complete one to their places, in their order,
    and remove unfinished ones. Every command that reads or writes a folder of patchkit's calls this first.

    Raises:
        InputError: they cannot be moved.
    """
    complete = folder / _COMPLETE
    if complete.is_dir() and not complete.is_symlink():
        try:
            for file in sorted(complete.iterdir()):  # numbered, see `_in_order`
                name = file.name.partition("-")[2]
                with suppress(FileNotFoundError):  # moved by another process just now
                    if name.endswith(_GONE):
                        (folder / name.removesuffix(_GONE)).unlink(missing_ok=True)
                        file.unlink()
                    else:
                        file.replace(folder / name)
            flush(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: writing it was cut off, and cannot be finished: {error}; run this where it can be written "
                "to"
            ) from None
        shutil.rmtree(complete, ignore_errors=True)
    remove_left(folder)
    remove_left(folder.absolute().parent)  # of a write that was killed just after the folder had appeared


def is_folder_with(folder: Path, mark: str) -> bool:
    """Whether `folder` holds a file named `mark`, or will when a write that was cut off there is finished."""
    return (folder / mark).is_file() or any((folder / _COMPLETE).glob(f"[0-9][0-9]-{mark}"))


def is_free(folder: Path) -> bool:
    """Whether nothing is in the place of `folder`, or an empty folder but for what a killed write left in it."""
    if not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and all(entry.name.startswith(_COMPLETE) for entry in folder.iterdir())


@contextmanager
def one_at_a_time(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold `folder` for everything that is read, computed and written there: another process that wants the same waits.

    The lock lies in the user's cache and not in the folder, which need not be there yet. Processes of other users or
    machines are not seen; `write_folder` with a `check` still refuses to replace what they have written meanwhile.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    file = cache_folder() / "locks" / f"{name}{_LOCK}"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"{folder}: another patchkit command is at work on it; waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _hidden_folder(place: Path) -> Iterator[Path]:
    """A new hidden folder in `place`, removed at the end unless it was renamed; those of killed processes go first."""
    place.mkdir(parents=True, exist_ok=True)
    remove_left(place)
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


def remove_left(place: Path) -> None:
    """Remove the hidden folders of processes that are gone; one at work holds its lock."""
    for left in place.glob(f"{_COMPLETE}.*{_LOCK}"):
        with suppress(Timeout, OSError), FileLock(left, blocking=False):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)


@contextmanager
def _switching(place: Path) -> Iterator[None]:
    """While the files of a folder in `place` are replaced, which takes moments, by one process at a time."""
    lock = place / f"{_COMPLETE}.switch{_LOCK}"
    with FileLock(lock):  # which looks, once it has the lock, whether the file is still there
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def flush(path: Path) -> None:
    """A file's contents, or what a folder lists, on disk: else a power failure may take what a rename has put there."""
    if os.name == "nt" and path.is_dir():  # there are no handles of folders to flush
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_unwritable(folder: Path, option: str = "") -> None:
    """Raises InputError where `folder` cannot be written to, or made, as far as can be told without writing."""
    place = folder.absolute()
    above = next(each for each in (place, *place.parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{option}{folder}: {above} cannot be written to; choose another place")
