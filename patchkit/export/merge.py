"""Patches merged into a checkpoint, on its files: no model is built, and one tensor at a time is in memory.

Every file of the base is copied; in the copies only the byte ranges of touched tensors are overwritten, so that names,
order, dtypes, metadata and whatever else the files hold stay as they are. The new folder appears under its name when it
is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from patchkit.errors import InputError
from patchkit.export.edits import Edit, check_base, collect_edits
from patchkit.export.record import BASES_OWN, Merged, MergedTensor, Rounding
from patchkit.export.rounded import RoundingTask, round_change, rounding_of
from patchkit.export.spectra import find_spectra
from patchkit.io.checkpoint import (
    Copy,
    find_checkpoint,
    new_folder,
    refuse_adapter,
    stored_tensors,
    visible_files,
)
from patchkit.io.files import refuse_unwritable
from patchkit.patch.bases import public_name
from patchkit.patch.patch import Patch
from patchkit.patch.together import refuse_shared_neurons
from patchkit.version import patchkit_version

Say = Callable[[str], None]
_COPIERS = 1  # beside the thread that rounds; more of them got in its way on two cores
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.safetensors")


def merge(
    patches: Sequence[Patch],
    base: str | Path,
    out: str | Path,
    *,
    rounding: Rounding | None = None,
    statistics: str | Path | None = None,
    force: bool = False,
    link: bool = False,
    say: Say = lambda line: None,
) -> Merged:
    """Write the checkpoint `base` with `patches` merged into it, in the order given, to the new folder `out`.

    Args:
        base: a folder, or the name of a Hub repository in the local cache; safetensors, sharded or not.
        rounding: "keys" rounds with error feedback along the edited keys and the statistics, "nearest" entry by
            entry; by default "keys" for 16-bit weights, "nearest" for wider ones.
        statistics: folder written by `patchkit stats --out`; by default the cache is searched. Without any, all
            directions count alike beside the keys.
        force: merge although touched weights have other numbers than those the patches were made for.
        link: hard-link weight files no patch touches, where they lie in the folder itself, instead of copying them.

    Raises:
        InputError: a base that is not the patches', not there or not in safetensors; an `out` that is in use; two
            patches that have rewritten the same neuron.
        PatchkitError: `out` cannot be written.
    """
    refuse_shared_neurons({f"{place}": patch.manifest for place, patch in enumerate(patches, 1)})
    source, target = find_base(str(base), _commit(patches, str(base)), out), Path(out)
    checkpoint = stored_tensors(source)
    edits = collect_edits(patches, checkpoint, source)
    by_keys = {edit.weight: edit.d_in for edit in edits if rounding_of(edit, rounding) == "keys" and not edit.of_expert}
    texts = find_spectra(by_keys, _solved(edits, patches), patches, source, statistics, say)
    tasks = [RoundingTask(edit, force, rounding_of(edit, rounding), texts.get(edit.weight)) for edit in edits]
    weights = {stored.file for stored in checkpoint.values()}
    with new_folder(target) as folder:
        places = {source / name: folder / BASES_OWN.get(str(name), name) for name in visible_files(source)}
        tensors = _write(tasks, places, weights if link else set())
        merged = _record(base, source, patches, tensors, force)
        merged.save(folder, target.name)
    if packed := sorted({patch.manifest.base.quantized for patch in patches if patch.manifest.base.quantized}):
        taken = f"{base} is taken for what they were made of by names and shapes, not by its numbers"
        say(f"note: made for weights quantized with {', '.join(packed)}: {taken}")
    if lost := [tensor for tensor in tensors if tensor.unchanged == 1]:
        gone = f"rounding to {lost[0].dtype} leaves nothing of its change"
        say(f"note: {lost[0].weight}: {gone}; merge into a float32 copy of the checkpoint, or attach the patch")
    _warn_of_other_weights([path.relative_to(source) for path in set(places) - weights], say)
    return merged


def _solved(edits: Sequence[Edit], patches: Sequence[Patch]) -> set[str]:
    """Weights that were solved for by statistics: they have keys. Rows of subjects' own neurons and imported changes
    were not; of a patch without its state nobody knows."""
    solved = {edit.weight for edit in edits if edit.keys.shape[1]}
    unknown = not any(patch.manifest.imported for patch in patches)
    return solved or {edit.weight for edit in edits if unknown}


def find_base(base: str, commit: str | None, out: str | Path) -> Path:
    """The folder with the checkpoint `base`, after checking that it can be merged into and `out` be written to.

    Raises:
        InputError: there are no safetensors files of it on this machine, or a LoRA beside them, or `out` is in use or
            lies in the base.
    """
    check_out(out)
    source, target = find_checkpoint(base, commit), Path(out).resolve()
    if target == source or source in target.parents:
        raise InputError(f"{out}: lies in the base itself, which is never written to; choose another folder")
    refuse_adapter(base, source)
    stored_tensors(source)
    return source


def check_out(out: str | Path) -> None:
    """Raises InputError where a merged checkpoint would come on top of something."""
    target = Path(out)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise InputError(f"{out}: exists and is not an empty folder; choose another one for the merged checkpoint")
    if target.resolve() == Path.cwd() or target.is_mount():
        what = "a mount point" if target.is_mount() else "the folder that this runs in"
        raise InputError(f"{out}: {what}, whose place nothing can take in one step; choose a folder in it")
    refuse_unwritable(target)


def _write(tasks: Sequence[RoundingTask], places: Mapping[Path, Path], linked: set[Path]) -> tuple[MergedTensor, ...]:
    """Copy all files to their places but for the touched tensors, which are written there changed."""
    holes: dict[Path, list[tuple[int, int]]] = {}
    for stored in (task.edit.stored for task in tasks):
        holes.setdefault(stored.file, []).append((stored.start, stored.size))
    copies = [Copy(path, to, holes.get(path, ()), path in linked - holes.keys()) for path, to in places.items()]
    for copy in copies:
        copy.prepare()
    with _one_core(), ThreadPoolExecutor(_COPIERS) as pool:  # the disk is busy while this thread rounds
        running = [pool.submit(copy.run) for copy in sorted(copies, key=lambda copy: -copy.source.stat().st_size)]
        try:
            reports = _merge_tensors(tasks, places)
            for copied in running:
                copied.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return reports


def _merge_tensors(tasks: Sequence[RoundingTask], places: Mapping[Path, Path]) -> tuple[MergedTensor, ...]:
    """One after the other; each is being written while the next is read, so that two at most are in memory."""
    reports, writing = [], None
    with ThreadPoolExecutor(1) as pool:
        for task in tasks:
            stored = task.edit.stored
            tensor = stored.read()
            if not task.force:
                check_base(task.edit, tensor)
            if writing:
                writing.result()
            changed, report = round_change(tensor, task)
            writing = pool.submit(stored.overwrite, changed, places[stored.file])
            reports.append(report)
            del tensor, changed
        if writing:
            writing.result()
    return tuple(reports)


@contextmanager
def _one_core() -> Iterator[None]:
    """Rounding's many small products are slower split up, and the other cores have files to copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _record(
    base: str | Path, source: Path, patches: Sequence[Patch], tensors: tuple[MergedTensor, ...], force: bool
) -> Merged:
    return Merged(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        base=public_name(str(base)),
        commit=source.name if source.parent.name == "snapshots" else None,
        forced=force,
        parents=tuple(patch.manifest for patch in patches),
        tensors=tensors,
        patchkit=patchkit_version(),
    )


def _commit(patches: Sequence[Patch], name: str) -> str | None:
    """The commit of the repository `name` that the patches for it agree on."""
    commits = {patch.manifest.base.commit for patch in patches if patch.manifest.base.name == name}
    return commits.pop() if len(commits) == 1 else None


def _warn_of_other_weights(files: Sequence[Path], say: Say) -> None:
    if others := sorted(str(path) for path in files if any(path.match(form) for form in _OTHER_WEIGHTS)):
        say(f"note: {', '.join(others)}: copied as they are, with the base's weights; remove them before publishing")
