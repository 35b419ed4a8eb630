"""What goes into a Hub repository, and the one commit that puts it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HfHubHTTPError

from patchkit.errors import InputError, PatchkitError
from patchkit.evaluate.metrics import summary_line
from patchkit.export import formats
from patchkit.export.evidence import is_shown
from patchkit.export.untouched import untouched
from patchkit.patch.card import FACT_ROWS, Kind, base_name
from patchkit.patch.manifest import Manifest
from patchkit.version import patchkit_version
from patchkit.words import counted, in_markdown

Say = Callable[[str], None]
WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")
_NOT_COPIED: type[Exception] = getattr(hub_errors, "FileDuplicationError", HfHubHTTPError)
_HELD = {"patch": "a patch", "adapter": "an adapter", "merged": "a whole model", None: "nothing"}


@dataclass(frozen=True)
class Package:
    """What goes into the repository: content by name there, in memory or still on disk.

    merged_into: of a merged model its base's repository on the Hub, and the commit.
    without_pictures: why there are none, where there should be.
    """

    kind: Kind
    manifests: Sequence[Manifest]
    files: Mapping[str, Path | bytes]
    merged_into: tuple[str, str | None] | None = None
    without_pictures: str | None = None

    @property
    def card(self) -> str:
        """The README.md."""
        readme = self.files["README.md"]
        return (readme if isinstance(readme, bytes) else readme.read_bytes()).decode()

    def sizes(self) -> dict[str, int]:
        """Bytes by file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }

    @property
    def title(self) -> str:
        """What the commit is called."""
        facts = counted(sum(len(manifest.facts) for manifest in self.manifests), "fact")
        return f"{self.kind.capitalize()}: {facts} in {base_name(self.manifests[0].base.name)}"

    @property
    def description(self) -> str:
        """What a pull request says below its title: each fact, what was measured, and what made it."""
        facts = {fact.id: fact for manifest in self.manifests for fact in manifest.facts}
        lines = [f"- {in_markdown(fact.prompt)} **{in_markdown(fact.target_new)}**" for fact in facts.values()]
        lines[FACT_ROWS:] = [f"- and {len(lines) - FACT_ROWS} more, in the manifest"] if len(lines) > FACT_ROWS else []
        measured = [summary_line(found) for manifest in self.manifests if (found := manifest.measured())]
        made = f"Made with patchkit {patchkit_version()}; README.md says how, and what to know before using it."
        return "\n".join([*lines, *(f"\nMeasured: {line}" for line in measured), f"\n{made}"])


def marks() -> dict[str, Kind]:
    """The files by which a folder or repository is known for what it holds; the first that is there counts."""
    adapters: dict[str, Kind] = {form.mark: "adapter" for form in formats.available().values()}
    return {"manifest.json": "patch", **adapters, "config.json": "merged"}


def kind_of(names: set[str]) -> Kind | None:
    """What a folder or repository with files of these names holds."""
    return next((kind for mark, kind in marks().items() if mark in names), None)


def check_kind(repo: str, there: set[str], wanted: Kind) -> None:
    """Raises InputError where a repository with the files `there` holds something else."""
    if (kind := kind_of(there)) not in (None, wanted):
        raise InputError(f"{repo}: it holds {_HELD[kind]}, and this is {_HELD[wanted]}; choose another name")


def commit(api: HfApi, package: Package, repo: str, there: set[str], say: Say, **how: Any) -> CommitInfo:
    """One commit of all files; weights that the base's repository has already are copied on the Hub, where that can be.

    Args:
        there: the files that the repository has.
        how: for `HfApi.create_commit`.

    Raises:
        InputError: the repository holds something else.
        PatchkitError: an upload failed, or the check of the card.
        HfHubHTTPError: the Hub refused.
    """
    check_kind(repo, there, package.kind)
    copies = untouched(api, package.files, *package.merged_into) if package.merged_into else {}
    try:
        done = _commit(api, package, repo, there, copies, **how)
    except (HfHubHTTPError, _NOT_COPIED) as error:
        if not copies or (isinstance(error, HfHubHTTPError) and error.response.status_code in (409, 412)):
            raise
        copies, done = {}, _commit(api, package, repo, there, {}, **how)  # another region, or no copies for us
    if copies and package.merged_into:
        say(f"{counted(len(copies), 'file')} copied on the Hub from {package.merged_into[0]}, not uploaded")
    return done


def _commit(
    api: HfApi, package: Package, repo: str, there: set[str], copies: Mapping[str, CommitOperationCopy], **how: Any
) -> CommitInfo:
    stale = sorted(name for name in there - set(package.files) if name.endswith(WEIGHTS) or name in marks())
    if package.kind == "patch":  # what shows another state of the patch
        stale += sorted(name for name in there - set(package.files) if is_shown(name))
    operations = [
        *(copies.get(name) or CommitOperationAdd(name, content) for name, content in sorted(package.files.items())),
        *(CommitOperationDelete(name) for name in stale),
    ]
    try:
        done: CommitInfo = api.create_commit(repo, operations, **how)
        return done
    except HfHubHTTPError:
        raise
    except (RuntimeError, ValueError) as error:  # from an upload, or the check of the card
        raise PatchkitError(f"{repo}: {error}; nothing was published, push again".replace("\n", " ")) from None
