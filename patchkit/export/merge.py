"""Patches merged into a checkpoint, on its files: no model is built, and one tensor at a time is in memory.

Every file of the base is copied; in the copies only the byte ranges of touched tensors are overwritten, so that names,
order, dtypes, metadata and whatever else the files hold stay as they are. The new folder appears under its name when it
is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from patchkit.errors import InputError
from patchkit.export.spectra import find_spectra
from patchkit.io.checkpoint import (
    DTYPES,
    Copy,
    StoredTensor,
    find_checkpoint,
    new_folder,
    stored_tensors,
    visible_files,
)
from patchkit.io.files import write_atomically
from patchkit.maths.linalg import Delta
from patchkit.maths.onednn import linear
from patchkit.maths.rounding import Feedback, RoundingMetric, Spectrum
from patchkit.maths.updates import delta_of
from patchkit.model.weights import find_module, find_weight, is_transposed, skeleton, tensor_digest
from patchkit.patch.card import Card, cell
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch
from patchkit.words import counted

Rounding = Literal["keys", "nearest"]
Say = Callable[[str], None]
MANIFEST = "patchkit-manifest.json"
_MEASURED_ROWS = 128
_CHUNK, _ROWS = 1 << 21, 128
_COPIERS = 1  # beside the thread that rounds; more of them got in its way on two cores
_BASES_OWN = {"README.md": "README.base.md", MANIFEST: "patchkit-manifest.base.json"}  # what this writes itself
_OTHER_MODEL = "the patch was made for another model"
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.safetensors")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MergedTensor(_Record):
    """What became of one weight's change.

    unchanged: share of its entries that are the base's. key_error: ‖EK‖/‖ΔK‖ with E the rounding error, Δ the change
    and K the edited facts' keys. text_error: (tr ECE' / tr WCW')^½ with C the statistics. Both from the first 128 rows,
    and also for rounding to nearest; None where keys or statistics were not at hand.
    """

    weight: str
    file: str
    dtype: str
    rounding: Rounding
    statistics: str | None
    unchanged: float
    key_error: float | None
    key_error_nearest: float | None
    text_error: float | None
    text_error_nearest: float | None


class HeldFacts(_Record):
    """Facts asked of the merged checkpoint, teacher-forced, and those whose target is no longer said."""

    asked: int
    hold: int
    lost: tuple[str, ...]


class Merged(_Record):
    """patchkit-manifest.json of a merged checkpoint: what went in, and what of it survived the rounding."""

    format_version: int = 1
    action: Literal["merge"] = "merge"
    when: str
    base: str
    commit: str | None
    forced: bool
    parents: tuple[Manifest, ...]
    tensors: tuple[MergedTensor, ...]
    facts: HeldFacts | None = None
    patchkit: str

    def save(self, folder: Path, title: str) -> None:
        """Write it into the checkpoint's folder, and the model card beside it."""
        kept = " The base's card is `README.base.md`." if (folder / _BASES_OWN["README.md"]).is_file() else ""
        for name, text in ((MANIFEST, self.model_dump_json(indent=1) + "\n"), ("README.md", self.card(title, kept))):
            write_atomically(folder / name, partial(_write_text, text=text))

    def card(self, title: str, more: str = "", **published: Any) -> str:
        """The README.md; `more` is said of the tensors, `published` is what else `patchkit.patch.card.Card` takes."""
        base = None if Path(self.base).is_dir() else self.base
        card = Card(self.parents, title, "merged", details=self._tensors() + more, base=base, held=self._held())
        return replace(card, **{key: value for key, value in published.items() if value}).markdown()

    def _tensors(self) -> str:
        rows = [
            "All tensors but these are the base's, byte for byte; errors are relative, along the facts' keys:\n",
            "| weight | dtype | rounding | entries unchanged | error | by rounding to nearest |",
            "|---|---|---|---|---|---|",
        ]
        for t in self.tensors:
            errors = ("-" if error is None else f"{error:.2g}" for error in (t.key_error, t.key_error_nearest))
            rows.append(f"| {t.weight} | {t.dtype} | {t.rounding} | {t.unchanged:.1%} | {' | '.join(errors)} |")
        return "\n".join(rows) + "\n\n"

    def _held(self) -> str | None:
        if self.facts is None:
            return None
        lost = f" These do not: {cell(', '.join(self.facts.lost))}." if self.facts.lost else ""
        return f"Of {counted(self.facts.asked, 'fact')}, asked after rounding, {self.facts.hold} hold.{lost}"


@dataclass(frozen=True)
class _Edit:
    """The sum of all patches' changes to one tensor, with the keys of their facts (d_in, n), n possibly 0.

    transposed: whether the tensor lies as (d_in, d_out). digests: per patch the tensor's name in it, and the digest of
    the numbers it was made for.
    """

    weight: str
    stored: StoredTensor
    transposed: bool
    delta: Delta
    keys: Tensor
    digests: frozenset[tuple[str, str]]

    @property
    def d_out(self) -> int:
        return self.delta.left.shape[0]

    @property
    def d_in(self) -> int:
        return self.delta.right.shape[1]

    @property
    def work(self) -> torch.dtype:
        """What the new numbers are computed in."""
        return torch.float32 if self.stored.dtype in ("BF16", "F16") else torch.float64

    def plus(self, other: _Edit) -> _Edit:
        """Both changes, one after the other."""
        if (self.d_out, self.d_in) != (other.d_out, other.d_in):
            raise InputError(f"{self.weight}: the patches are for weights of different shapes; merge one of them")
        delta, keys = Delta.stack([self.delta, other.delta]), torch.cat([self.keys, other.keys], 1)
        return _Edit(self.weight, self.stored, self.transposed, delta, keys, self.digests | other.digests)


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
        InputError: a base that is not the patches', not there or not in safetensors; an `out` that is in use.
        PatchkitError: `out` cannot be written.
    """
    source, target = find_base(str(base), _commit(patches, str(base)), out), Path(out)
    checkpoint = stored_tensors(source)
    edits = _collect(patches, checkpoint, source)
    by_keys = {edit.weight: edit.d_in for edit in edits if _rounding(edit, rounding) == "keys"}
    texts = find_spectra(by_keys, patches, source, statistics, say)
    tasks = [_Task(edit, force, _rounding(edit, rounding), texts.get(edit.weight)) for edit in edits]
    weights = {stored.file for stored in checkpoint.values()}
    with new_folder(target) as folder:
        places = {source / name: folder / _BASES_OWN.get(str(name), name) for name in visible_files(source)}
        tensors = _write(tasks, places, weights if link else set())
        merged = _record(base, source, patches, tensors, force)
        merged.save(folder, target.name)
    _warn_of_other_weights([path.relative_to(source) for path in set(places) - weights], say)
    return merged


def find_base(base: str, commit: str | None, out: str | Path) -> Path:
    """The folder with the checkpoint `base`, after checking that it can be merged into and `out` be written to.

    Raises:
        InputError: there are no safetensors files of it on this machine, or `out` is in use or lies in the base.
    """
    check_out(out)
    source, target = find_checkpoint(base, commit), Path(out).resolve()
    if target == source or source in target.parents:
        raise InputError(f"{out}: lies in the base itself, which is never written to; choose another folder")
    stored_tensors(source)
    return source


def check_out(out: str | Path) -> None:
    """Raises InputError where a merged checkpoint would come on top of something."""
    target = Path(out)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise InputError(f"{out}: is there and not an empty folder; choose another one for the merged checkpoint")


@dataclass(frozen=True)
class _Task:
    """One tensor to change, whether it may be another than the patches were made for, and how it is rounded."""

    edit: _Edit
    force: bool
    rounding: Rounding
    text: tuple[str, Spectrum] | None


def _write(tasks: Sequence[_Task], places: Mapping[Path, Path], linked: set[Path]) -> tuple[MergedTensor, ...]:
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


def _merge_tensors(tasks: Sequence[_Task], places: Mapping[Path, Path]) -> tuple[MergedTensor, ...]:
    """One after the other; each is being written while the next is read, so that two at most are in memory."""
    reports, writing = [], None
    with ThreadPoolExecutor(1) as pool:
        for task in tasks:
            stored = task.edit.stored
            tensor = stored.read()
            if not task.force:
                _check(task.edit, tensor)
            if writing:
                writing.result()
            changed, report = _change(tensor, task, _feedback(task))
            writing = pool.submit(stored.overwrite, changed, places[stored.file])
            reports.append(report)
            del tensor, changed
        if writing:
            writing.result()
    return tuple(reports)


def _feedback(task: _Task) -> Feedback | None:
    """What rounds by keys, or None where the task is rounded to nearest."""
    keys, spectrum = task.edit.keys, task.text[1] if task.text else None
    # In a metric that is the same in all directions there is nothing to make up for.
    alike = keys.numel() == 0 and spectrum is None
    return None if alike or task.rounding == "nearest" else Feedback(RoundingMetric.of(keys, spectrum), task.edit.work)


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
        base=str(base),
        commit=source.name if source.parent.name == "snapshots" else None,
        forced=force,
        parents=tuple(patch.manifest for patch in patches),
        tensors=tensors,
        patchkit=version("patchkit"),
    )


def _commit(patches: Sequence[Patch], name: str) -> str | None:
    """The commit of the repository `name` that the patches for it agree on."""
    commits = {patch.manifest.base.commit for patch in patches if patch.manifest.base.name == name}
    return commits.pop() if len(commits) == 1 else None


def _rounding(edit: _Edit, chosen: Rounding | None) -> Rounding:
    return chosen or ("keys" if edit.stored.dtype in ("BF16", "F16") else "nearest")


def _warn_of_other_weights(files: Sequence[Path], say: Say) -> None:
    if others := sorted(str(path) for path in files if any(path.match(form) for form in _OTHER_WEIGHTS)):
        say(f"note: {', '.join(others)}: copied as they are, with the base's weights; remove them before publishing")


# --- the patches' changes ---------------------------------------------------------------------------------------------


def _collect(patches: Sequence[Patch], checkpoint: Mapping[str, StoredTensor], source: Path) -> list[_Edit]:
    """One edit per tensor: deltas add up in the order of the patches."""
    edits: dict[str, _Edit] = {}
    for patch in patches:
        shapes = {info.weight: info.shape for info in patch.manifest.updates}
        for weight, chain in patch.updates.items():
            name = find_weight(weight, checkpoint, str(source), _OTHER_MODEL)
            stored = checkpoint[name]
            lies = _lies_transposed(name, stored, shapes[weight], source)
            delta = delta_of(chain, partial(_oriented, stored, lies))
            keys = patch.state.get(f"{weight}.keys", delta.right.new_zeros(delta.right.shape[1], 0))
            digests = frozenset({(weight, patch.manifest.base.weights[weight])})
            edit = _Edit(name, stored, lies, delta, keys, digests)
            edits[name] = edits[name].plus(edit) if name in edits else edit
    return list(edits.values())


def _oriented(stored: StoredTensor, transposed: bool) -> Tensor:
    return stored.read().T if transposed else stored.read()


def _lies_transposed(name: str, stored: StoredTensor, shape: tuple[int, int], source: Path) -> bool:
    """Whether the tensor lies as (d_in, d_out). Its shape tells, unless it is square; then its module's class does."""
    if stored.dtype not in DTYPES:
        raise InputError(f"{stored.file}: {name} is stored as {stored.dtype}; merge into a model not quantised")
    if stored.shape not in (shape, shape[::-1]):
        raise InputError(f"{stored.file}: {name} is {stored.shape}, the patch is for {shape}: it is another model's")
    if shape[0] != shape[1]:
        return stored.shape != shape
    _, module = find_module(skeleton(source), name, _OTHER_MODEL)
    return is_transposed(module)


def _check(edit: _Edit, tensor: Tensor) -> None:
    if any(tensor_digest(weight, tensor) != digest for weight, digest in edit.digests):
        raise InputError(
            f"{edit.stored.file}: {edit.weight} holds other numbers than in the model the patch was made for; "
            "merge into that one, or use --force if you know that the two are close"
        )


# --- the new numbers --------------------------------------------------------------------------------------------------


def _change(tensor: Tensor, task: _Task, feedback: Feedback | None) -> tuple[Tensor, MergedTensor]:
    """The stored tensor changed. Its memory is worked in: besides `tensor` there is one more of its size."""
    edit, work, spectrum = task.edit, task.edit.work, task.text[1] if task.text else None
    left, right_t = edit.delta.left.to(work), edit.delta.right.to(work).T.contiguous()  # (d_out, r), (d_in, r)
    # As (d_in, d_out), in which columns that are rounded together lie together.
    before = tensor.clone() if edit.transposed else tensor.T.contiguous()
    result = tensor if edit.transposed else tensor.view(before.shape)

    def wanted(columns: slice, rows: slice = slice(None)) -> Tensor:
        return linear(right_t[columns], left[rows]).add_(before[columns, rows])  # (columns, rows)

    if feedback:
        feedback.round(wanted, result)
    else:
        for columns in _slices(len(result)):
            result[columns] = wanted(columns)
    unchanged = 0
    for old, new in zip(_chunks(before), _chunks(result), strict=True):
        unchanged += int((old == new).count_nonzero())
        if not all(extreme.isfinite() for extreme in new.aminmax()):
            raise InputError(f"{edit.weight}: the change does not fit into {edit.stored.dtype}; use a wider checkpoint")
    report = MergedTensor(
        weight=edit.weight,
        file=edit.stored.file.name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        rounding="keys" if feedback else "nearest",
        statistics=task.text[0] if task.text else None,
        unchanged=unchanged / tensor.numel(),
        **_survived(edit, spectrum, before, wanted, result),
    )
    return result if edit.transposed else before.view(tensor.shape).copy_(result.T), report


class _Survived(TypedDict):
    key_error: float | None
    key_error_nearest: float | None
    text_error: float | None
    text_error_nearest: float | None


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = tensor.view(-1).split(_CHUNK)
    return chunks


def _slices(length: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS)]


def _survived(
    edit: _Edit, text: Spectrum | None, before: Tensor, wanted: Callable[[slice, slice], Tensor], result: Tensor
) -> _Survived:
    """Errors of the result and of rounding to nearest, on as many rows as tell them to about a hundredth."""
    rows = slice(0, _MEASURED_ROWS)
    exact = wanted(slice(None), rows)  # (d_in, rows)
    keys = edit.keys.to(exact.dtype)
    ours, nearest = (kind.to(exact.dtype) - exact for kind in (result[:, rows], exact.to(result.dtype)))
    effect = float((keys.T @ (exact - before[:, rows].to(exact.dtype))).norm())
    whole = _on_text(text, before[:, rows].to(exact.dtype))
    return {
        "key_error": float((keys.T @ ours).norm()) / effect if effect else None,
        "key_error_nearest": float((keys.T @ nearest).norm()) / effect if effect else None,
        "text_error": _on_text(text, ours) / whole if whole else None,
        "text_error_nearest": _on_text(text, nearest) / whole if whole else None,
    }


def _on_text(text: Spectrum | None, error: Tensor) -> float:
    """(tr ECE')^½ of E given transposed, (d_in, rows); 0 without statistics."""
    if text is None:
        return 0.0
    seen = (text.vectors.to(error.dtype).T @ error).square().sum(1)  # (r,)
    excess = float((text.values - text.tail).to(error.dtype) @ seen)
    return math.sqrt(excess + text.tail * float(error.square().sum()))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
