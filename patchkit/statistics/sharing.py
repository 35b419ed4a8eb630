"""Statistics shared through the Hub: the files of a store as they are, each with what made it and a checksum inside.

What was computed once for a model on a text is found by everybody who edits that very model with that very text; a file
for anything else is never taken, whoever published it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

from patchkit.errors import InputError
from patchkit.io.checked import Damaged
from patchkit.io.files import write_atomically
from patchkit.io.hub import hub_errors
from patchkit.statistics.store import Entry, Kind, StatisticsStore
from patchkit.words import counted

_README = """# Statistics of plain text for patchkit

Second moments of the keys of language models, which editing methods need. `patchkit stats --pull {repo}` puts them
where `patchkit apply` finds them: each file says which model and text it is of, and is used for no other.
"""


def push_statistics(root: str | Path, repo: str) -> tuple[int, str]:
    """Publish all statistics under `root` in one commit; files of that name there are replaced.

    Returns:
        How many files, and the commit's page.

    Raises:
        InputError: there are none, one is damaged, or the repository may not be written to.
        PatchkitError: the Hub cannot be reached.
    """
    store = StatisticsStore(root)
    entries = list(_verified(store, str(root)))
    if not entries:
        raise InputError(f"--push {repo}: there are no statistics in {root}; compute them first, with --out {root}")
    with hub_errors(repo):
        api = HfApi(library_name="patchkit")
        api.create_repo(repo, exist_ok=True)
        adds = [CommitOperationAdd(entry.origin.file.as_posix(), entry.file) for entry in entries]
        if "README.md" not in {file.rfilename for file in api.model_info(repo).siblings or ()}:
            adds.append(CommitOperationAdd("README.md", _README.format(repo=repo).encode()))
        done = api.create_commit(repo, adds, commit_message=f"Statistics: {counted(len(entries), 'file')}")
    return len(entries), done.commit_url


def pull_statistics(repo: str, root: str | Path | None = None) -> list[Entry]:
    """Fetch the statistics in a repository into the store at `root`, by default the one in the user's cache.

    Raises:
        InputError: there are none of this version, or one is damaged.
        PatchkitError: the Hub cannot be reached.
    """
    name, _, revision = repo.partition("@")
    with hub_errors(name):
        folder = snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors"])
    store, found = StatisticsStore(root), list(_verified(StatisticsStore(folder), repo))
    if not found:
        raise InputError(f"{repo}: holds no statistics that this version of patchkit reads")
    for entry in found:
        write_atomically(store.root / entry.origin.file, lambda path, file=entry.file: _copy(file, path))  # type: ignore[misc]
    return found


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _verified(store: StatisticsStore, where: str) -> Iterator[Entry]:
    """What a store holds, each checked against its checksum; by its header, whatever its name is."""
    for kind in get_args(Kind):
        for entry in store.entries(kind):
            try:
                entry.verified()
            except Damaged as error:
                raise InputError(f"{where}: {error}; compute it again") from None
            yield entry
