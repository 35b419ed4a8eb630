"""The patch: factored updates by on-disk weight name, a manifest with the history, and the state to continue from.

my-patch/
  patch.safetensors   <weight>.<place>.<part>: the parts of a weight's updates, which act in the order of their places:
                      left (d_out, r) and right (r, d_in) of W' = W + left @ right, or those of another kind in
                      patchkit.maths.updates. Where subjects have neurons of their own, the rows of those in the weights
                      that open the feed-forward are among them, and the first update of the output projection is by
                      what its other neurons make up for them (patchkit.editing.neurons)
  manifest.json       patchkit.patch.manifest.Manifest
  provenance.json     how it came about, in SLSA's form (patchkit.patch.provenance)
  README.md           model card made from the manifest
  patch.sig           a signature, of a patch that was signed (patchkit.patch.signing)
  state.safetensors   <weight>.keys (d_in, n), <weight>.residuals (d_out, n): the columns of each fact in each solve, in
                      the order of patch.history.solve_records; values.targets, values.start (d, n): one for each fact;
                      of a quantized base <weight>.row_norms (d_out, 1), <weight>.column_norms (d_in, 1)
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.evaluate.report import Outcome
from patchkit.io.files import write_folder
from patchkit.io.hub import patch_folder
from patchkit.maths.blocks import joined
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain, delta_of
from patchkit.model.arch import Architecture
from patchkit.model.digests import tensor_digest, weight_digest
from patchkit.model.openers import all_sites
from patchkit.model.weights import Site, find_weight, read_weight
from patchkit.patch.bases import remember
from patchkit.patch.card import model_card
from patchkit.patch.manifest import Manifest, Origin
from patchkit.patch.provenance import provenance_text
from patchkit.patch.stored import (
    MANIFEST,
    PROVENANCE,
    SIGNATURE,
    digests_of,
    manifest_text,
    read_stored,
    warn_without_digests,
)
from patchkit.patch.tensors import STATE, UPDATES, check_rows, check_state, numbers_of, read_tensors, updates_in

OWN_FILES = (UPDATES, STATE, "rejected.jsonl", "README.md", PROVENANCE, SIGNATURE, MANIFEST)
"""What patchkit writes, replaces and removes in a patch's folder. The manifest, which has the digest of the tensors,
comes last: of a write that was cut off, no mixture is taken for a patch."""


@dataclass(frozen=True)
class Patch:
    """Updates by on-disk weight name, with the manifest and, for continuing and reverting, the state.

    Attributes:
        manifest: the base, the facts, the history of runs, and what was measured.
        updates: for each edited weight (d_out, d_in) its updates, in the order in which they act.
        state: keys (d_in, n) and residuals (d_out, n) of each solve; empty where the patch was published without.

    Examples:
        With `model` and `patch` as in the example of `patchkit.apply`:

        >>> patch.save(folder)
        >>> patchkit.Patch.load(folder).manifest.digest == patch.manifest.digest
        True
        >>> with patch.attached(model) as patched:
        ...     print(patched.patchkit.manifests[patched.patchkit.active[0]].facts[0].target_new)
        Liscombe
    """

    manifest: Manifest
    updates: Mapping[str, Chain]
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """`model` with the patch attached, inside the block; its weights are never written.

        The same as `patchkit.load` before the block and `delete` after it: quantized and offloaded models take the
        patch as well, and it acts on top of the patches that are attached already.

        Raises:
            InputError: the model is not the one the patch was made for (the message names the first weight that
                differs), or it has this patch already.
        """
        from patchkit.patch.stack import PatchStack  # which is made of patches

        with PatchStack.of(model).attached(self):
            yield model

    def on(self, arch: Architecture, force: bool = False) -> dict[int, Delta]:
        """The updates of output projections as one low-rank delta by layer of `arch`, after checking that it is the
        patch's base.

        Raises:
            InputError: it is another model (skipped with force, as long as the shapes fit).
        """
        sites, found, blocks = self.sites(arch, force), dict[int, Delta](), dict[int, dict[int, Delta]]()
        for name, chain in self.updates.items():
            site = sites[name]
            if site.opens:
                continue
            delta = delta_of(chain, lambda site=site: read_weight(site).float())  # type: ignore[misc]
            if site.expert is None:
                found[site.layer] = delta
            else:
                blocks.setdefault(site.layer, {})[site.expert] = delta
        return found | {layer: joined(parts, arch.sites[layer].blocks) for layer, parts in blocks.items()}

    def sites(self, arch: Architecture, force: bool = False) -> dict[str, Site]:
        """Where on `arch` every weight of the patch's base is, by on-disk name, and by its name in the state dict where
        the weights of experts together are; checks and raises as `on` does."""
        base, found = self.manifest.base, {}
        sites = {site.weight_name: site for site in all_sites(arch)}
        for name, digest in base.weights.items():
            site = sites[find_weight(name, sites, type(arch.model).__name__, base.advice)]
            shape = self.shapes.get(name)
            if shape is not None and (site.d_out, site.d_in) != shape:
                raise base.wrong_shape(name, f"{site.d_out} x {site.d_in}")
            if not force and weight_digest(site, name) != digest:
                raise base.wrong_numbers(name)
            found[name] = site
            if site.expert is not None:  # the columns of all experts together are the layer's
                found[arch.sites[site.layer].weight_name] = arch.sites[site.layer]
        for name, site in found.items():
            check_rows(self.state, name, site.d_out, site.d_in)
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each weight with updates, by its on-disk name."""
        return {info.weight: info.shape for info in self.manifest.updates}

    def with_metrics(
        self,
        metrics: Mapping[str, Any],
        outcomes: Mapping[str, Outcome] | None = None,
        origin: Origin | None = None,
    ) -> Patch:
        """The patch with `metrics` noted in the last run of its history, what became of each fact by its id, and what
        the run was started from."""
        more = {"origin": origin} if origin else {}
        last = self.manifest.history[-1].model_copy(update={"metrics": dict(metrics), **more})
        noted = {"history": (*self.manifest.history[:-1], last), "outcomes": dict(outcomes or {})}
        return replace(self, manifest=self.manifest.model_copy(update=noted))

    def save(
        self,
        folder: str | Path,
        over: Patch | None = None,
        beside: Callable[[Path], None] = lambda into: None,
    ) -> None:
        """Write the patch's folder, whole or not at all; an earlier patch there is replaced, other files stay.

        After a kill, `load` finds the old patch or the new one, and puts away what was left.

        Args:
            over: the patch that was read from `folder`, from which this one was made. Nothing is replaced where
                another one is there by now.
            beside: writes what else belongs to it, of the names in `OWN_FILES`, into the folder that it is given.

        Raises:
            InputError: a folder has the name of one of its files, or `over` is no longer there.
        """
        folder = Path(folder)

        def write(into: Path) -> None:
            save_file(numbers_of(self.updates), into / UPDATES, {"format": "pt"})
            if self.state:
                save_file(dict(self.state), into / STATE, {"format": "pt"})
            statement = provenance_text(self.manifest, digests_of(into))
            (into / PROVENANCE).write_text(statement, encoding="utf-8")
            (into / MANIFEST).write_text(manifest_text(self.manifest, digests_of(into)), encoding="utf-8")
            (into / "README.md").write_text(model_card(self.manifest, folder.absolute().name), encoding="utf-8")
            beside(into)

        def check() -> None:
            if over is not None and (not folder.exists() or read_manifest(folder) != over.manifest):
                raise InputError(
                    f"{folder}: it is another patch by now than the one this started from; nothing was written, run "
                    "the same command again"
                )

        remember(self.manifest.base.name, self.manifest.base.weights)
        write_folder(folder, OWN_FILES, write, check)

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """Read a patch, a folder or a Hub repository, and check all of it against the manifest's digests.

        Raises:
            InputError: not a patch, a newer format, or anything in it that is not what was written.
            PatchkitError: the Hub cannot be reached.
        """
        folder = patch_folder(folder)
        stored = read_stored(folder)
        manifest = stored.manifest
        with_state = _is_there(folder / STATE)
        for name in (UPDATES, *(each for each in (STATE, PROVENANCE) if _is_there(folder / each))):
            stored.check(folder, name)
        updates = updates_in(manifest, read_tensors(folder / UPDATES), folder)
        if updates_digest(updates) != manifest.digest:
            raise InputError(f"{folder}: {UPDATES} is not the one in {MANIFEST}; get the patch again")
        state = read_tensors(folder / STATE) if with_state else {}
        check_state(manifest, state, folder)
        if stored.digest is None:
            warn_without_digests(folder)
        return cls(manifest, updates, state)


def copy_patch(source: Path, folder: Path) -> None:
    """Put the files of the patch in `source` into `folder` as they are, signature included; see `Patch.save`."""

    def write(into: Path) -> None:
        for name in OWN_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, into / name)

    write_folder(folder, OWN_FILES, write)


def _is_there(file: Path) -> bool:
    """Whether anything has the name, a pipe or a link that leads nowhere included."""
    return file.exists() or file.is_symlink()


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a patch's folder, in which a write that was cut off is finished first.

    Raises:
        InputError: there is none, it is damaged, contradicts itself, or is of a newer format.
    """
    return read_stored(folder).manifest


def updates_digest(updates: Mapping[str, Chain]) -> str:
    """sha256 over the digests of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(numbers_of(updates).items()):
        digest.update(tensor_digest(name, tensor).encode())
    return digest.hexdigest()
