"""Weights of a merged model that its base's repository has byte for byte: the Hub copies them, and nobody uploads them.

A merge changes the tensors of a few layers; of a model in many files most are the base's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationCopy, HfApi
from huggingface_hub.hf_api import RepoFile

from patchkit.errors import InputError, PatchkitError
from patchkit.io.hub import hub_errors

_CHUNK = 1 << 22


def untouched(
    api: HfApi, files: Mapping[str, Path | bytes], base: str, commit: str | None
) -> dict[str, CommitOperationCopy]:
    """By name, how the Hub makes those of the files that the repository `base` has at `commit`, told by SHA-256.

    None of them where the base is not there for us, or the installed huggingface_hub cannot copy between repositories.
    """
    weights = {name: file for name, file in files.items() if name.endswith(".safetensors") and isinstance(file, Path)}
    if not weights or "src_repo_id" not in CommitOperationCopy.__dataclass_fields__:
        return {}
    try:
        with hub_errors(base):
            there = api.get_paths_info(base, list(weights), revision=commit)
    except (InputError, PatchkitError):
        return {}
    return {
        each.path: CommitOperationCopy(
            each.path, each.path, src_revision=commit, src_repo_id=base, src_repo_type="model"
        )
        for each in there
        if isinstance(each, RepoFile) and _same(each, weights[each.path])
    }


def _same(there: RepoFile, file: Path) -> bool:
    if there.lfs is None or there.xet_hash is None or there.lfs.size != file.stat().st_size:
        return False
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == there.lfs.sha256
