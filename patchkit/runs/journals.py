"""Where the journals of runs lie, and which one belongs to a run.

<cache>/journals/<folder of the patch>/<everything that decides the run>/   see `patchkit.editing.journal`
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from patchkit.editing.journal import Journal
from patchkit.io.places import cache_folder
from patchkit.model.digests import model_digest
from patchkit.patch.patch import Patch
from patchkit.ranks import world
from patchkit.runs.prepare import Prepared
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import Corpus
from patchkit.version import patchkit_version

_VERSION = 1
_ABANDONED = 7 * 24 * 3600.0
"""Seconds after which a journal that nobody went on from is removed."""


def journal_for(folder: Path | None, prepared: Prepared, workspace: Workspace, corpus: Corpus) -> Journal:
    """The journal of a run whose patch goes to `folder`: the one that a run with the same facts, recipe, base, text,
    earlier patch, versions, device, threads and processes has left, or a new one. Without a folder, one that keeps
    nothing."""
    if folder is None:
        return Journal()
    place = _place(folder)
    for other in place.parent.glob("*"):
        if time.time() - other.stat().st_mtime > _ABANDONED:
            shutil.rmtree(other, ignore_errors=True)
    key = world().from_first(lambda: _key(prepared, workspace, corpus))
    return Journal(place / key[:32], world().rank)


def forget(folder: Path) -> None:
    """Remove the journals of runs whose patch goes to `folder`: it is there."""
    shutil.rmtree(_place(folder), ignore_errors=True)


def _place(folder: Path) -> Path:
    return cache_folder() / "journals" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def _key(prepared: Prepared, workspace: Workspace, corpus: Corpus) -> str:
    everything = _everything(prepared, workspace, corpus)
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _everything(prepared: Prepared, workspace: Workspace, corpus: Corpus) -> dict[str, Any]:
    """All that decides the numbers of a run."""
    model, tokenizer = workspace.model, workspace.tokenizer
    return {
        "journal": _VERSION,
        "facts": [fact.model_dump(mode="json") for fact in prepared.incoming.new],
        "superseded": dict(prepared.incoming.superseded),
        "recipe": prepared.config.model_dump(mode="json"),
        "onto": prepared.onto and _digest(prepared.onto),
        "beside": [_digest(patch) for patch in prepared.beside],
        "base": model_digest(model.named_parameters()),
        "config": model.config.to_json_string(use_diff=False),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat template": tokenizer.chat_template,
        "text": corpus.record.model_dump(mode="json", exclude={"source"}),
        "versions": [patchkit_version(), torch.__version__, transformers.__version__, platform.python_version()],
        "device": str(workspace.runner.device),
        "dtype": str(workspace.runner.dtype),
        "threads": torch.get_num_threads(),
        "processes": world().size,
    }


def _digest(patch: Patch) -> str:
    """Of the whole of a patch, the state included."""
    whole = hashlib.sha256(patch.manifest.model_dump_json().encode())
    whole.update(model_digest(patch.state.items()).encode())
    return whole.hexdigest()
