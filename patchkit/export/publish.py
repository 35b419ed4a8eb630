"""A patch, an adapter or a merged checkpoint as a Hub repository: its files and a card, in one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)
from pydantic import BaseModel, ValidationError

from patchkit.errors import InputError, PatchkitError
from patchkit.export import formats
from patchkit.export.beside import adapter_beside, renamed_base
from patchkit.export.evidence import FOLDER, PAGE, Evidence, Look
from patchkit.export.job import Exported
from patchkit.export.package import WEIGHTS, Package, Say, check_kind, commit, kind_of, marks
from patchkit.export.record import MANIFEST, Merged
from patchkit.io.checkpoint import leads_out, visible_files
from patchkit.io.files import finish_folder
from patchkit.io.hub import PATCH_FILES, hub_errors, is_repo_name
from patchkit.patch.bases import is_path
from patchkit.patch.card import Card, Kind, base_name
from patchkit.patch.manifest import Manifest
from patchkit.patch.patch import Patch
from patchkit.patch.provenance import provenance_text
from patchkit.patch.stored import PROVENANCE, SIGNATURE, digests_of, manifest_text, read_stored

_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Pushed:
    """Where it went: the commit, and the pull request's page where there is one."""

    repo: str
    commit: str
    url: str


def pack(
    folder: str | Path,
    repo: str,
    *,
    base: str | None = None,
    card: str | Path | None = None,
    online: bool = False,
    adapter: bool = False,
    look: Look | None = None,
) -> Package:
    """Collect what a push would publish; reads the folder, and the base's license where it is at hand.

    Args:
        base: the base's name on the Hub, where the patch was made from a local folder.
        card: a README.md to take instead of the generated one.
        online: ask the Hub for the base's card if it is not in the cache.
        adapter: to a patch, add its adapter for PEFT and vLLM.
        look: to a patch, add the page and the pictures that this gives.

    Raises:
        InputError: the folder holds no patch, adapter or merged checkpoint, or what it holds is damaged; or there is to
            be an adapter, and the base's config.json is not at hand.
    """
    folder = Path(folder)
    _check_name(repo)
    if base is not None and not is_repo_name(base):
        raise InputError(f"--base {base}: not the name of a Hub repository; give user/repo")
    content = _read(folder)
    info = content.manifests[0].base
    bases = {info.name: info.commit} | ({base: None} if base else {})
    cards = [folder / "README.base.md", *(c for name, commit in bases.items() for c in _cards(name, commit, online))]
    license, terms = _terms(cards)
    files: dict[str, Path | bytes] = {**terms, **_files(folder, content.kind)}
    if base is not None:
        files |= content.naming(base, folder)
    else:
        files |= content.without_paths(folder)
    also = ""
    if adapter and content.kind == "patch":
        beside, also = adapter_beside(Patch.load(folder), base)
        files |= beside
    found = look(folder, content.manifests[0], repo) if look and content.kind == "patch" else None
    if found:
        files |= found.files
    try:
        readme = Path(card).read_bytes() if card else content.card(repo, base, license, also, found).encode()
    except OSError as error:
        raise InputError(f"--card {card}: cannot be read: {error.strerror}") from None
    files |= {"README.md": readme}
    missing = found.missing if found else None
    return Package(content.kind, content.manifests, files, content.merged_into(base), missing)


def check_destination(repo: str) -> None:
    """What can be known of a push before there is anything to publish: the name, the login, what the repository holds.

    Raises:
        InputError: the name is none, nobody is logged in, or the repository holds something other than a patch.
        PatchkitError: the Hub cannot be reached.
    """
    _check_name(repo)
    if get_token() is None:
        raise InputError(f"{repo}: nobody is logged in to the Hub here; `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="patchkit")
    with hub_errors(repo):
        api.whoami()
        there = api.model_info(repo).siblings if api.repo_exists(repo) else None
    check_kind(repo, {file.rfilename for file in there or ()}, "patch")


def push(
    package: Package,
    repo: str,
    *,
    private: bool = False,
    pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    say: Say = lambda line: None,
) -> Pushed:
    """Publish a package in one commit: after a failure the repository is as it was.

    Weights that an earlier push left and this one does not have are deleted in the same commit. A repository of the
    same owner that the patch names as its parent gets a link to the new one.

    Args:
        private: make the repository private; refused where it exists and is public.
        pr: open a pull request instead of committing.
        branch: commit to this branch, made from main where it does not exist.
        tag: tag the commit; refused where the tag exists.

    Raises:
        InputError: the repository holds something else, is not the user's, or an option does not fit.
        PatchkitError: the network or the Hub failed, or somebody else pushed meanwhile.
    """
    if pr and (branch or tag):
        raise InputError("--pr goes to main and is tagged when merged; leave out --branch and --tag")
    api = HfApi(library_name="patchkit")
    with hub_errors(repo):
        if not pr:
            api.create_repo(repo, private=private or None, exist_ok=True)
        here = api.model_info(repo)
        if private and not here.private:
            raise InputError(f"{repo}: it exists and is public; make it private on its page, or leave out --private")
        if tag and tag in {ref.name for ref in api.list_repo_refs(repo).tags}:
            raise InputError(f"{repo}: it has a tag {tag} already; choose another")
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
            here = api.model_info(repo, revision=branch)
        done = commit(
            api,
            package,
            repo,
            {file.rfilename for file in here.siblings or ()},
            say,
            commit_message=message or package.title,
            commit_description=package.description,
            revision=branch,
            parent_commit=None if pr else here.sha,
            create_pr=pr,
        )
    if tag:
        _tag(api, repo, tag, done.oid)
    if not (private or here.private or pr or branch):
        _link_parents(api, package, repo, say)
    return Pushed(repo, done.oid, done.pr_url or done.commit_url)


def _tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    try:
        with hub_errors(repo):
            api.create_tag(repo, tag=tag, revision=commit)
    except PatchkitError as error:
        raise PatchkitError(f"pushed as {commit}, but not tagged {tag}: {error}") from None


@dataclass(frozen=True)
class _Content:
    """What a folder holds, as its manifest says."""

    kind: Kind
    record: Manifest | Exported | Merged

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return (self.record,) if isinstance(self.record, Manifest) else self.record.parents

    def merged_into(self, base: str | None) -> tuple[str, str | None] | None:
        """Of a merged model its base's repository, `base` where that is given, and the commit."""
        if not isinstance(self.record, Merged):
            return None
        name, commit = (base, None) if base else (self.record.base, self.record.commit)
        return (name, commit) if is_repo_name(name) else None

    def card(
        self, repo: str, base: str | None, license: Mapping[str, Any], also: str = "", found: Evidence | None = None
    ) -> str:
        if isinstance(self.record, Manifest):
            library = "peft" if also else None  # whose loads the Hub counts as downloads
            shown = {f"{FOLDER}/{each.name}": each.says for each in found.pictures} if found else {}
            card = Card(
                self.manifests,
                repo,
                self.kind,
                base=base,
                license=license,
                library=library,
                also=also,
                page=PAGE if found else None,
                pictures=shown,
            )
            return card.markdown()
        if isinstance(self.record, Exported):
            return formats.get(self.record.format).card(self.record, repo, base=base, license=license)
        return self.record.card(repo, base=base, license=license)

    def naming(self, base: str, folder: Path) -> dict[str, bytes]:
        """The files that name the base, with its name on the Hub in place of a folder on this machine."""

        def renamed(manifest: Manifest) -> Manifest:
            info = manifest.base.model_copy(update={"name": base, "commit": None})
            return manifest.model_copy(update={"base": info})

        if isinstance(self.record, Manifest):
            if (folder / SIGNATURE).is_file():
                raise InputError(
                    f"--base {base}: the patch is signed, and another name for its base would break that; leave out "
                    f"--base, or remove {SIGNATURE}"
                )
            return _manifest_and_provenance(renamed(self.record), folder)
        parents = tuple(map(renamed, self.record.parents))
        if isinstance(self.record, Merged):
            return {MANIFEST: _json(self.record.model_copy(update={"parents": parents, "base": base, "commit": None}))}
        return {MANIFEST: _json(self.record.model_copy(update={"parents": parents})), **self._texts(base, folder)}

    def without_paths(self, folder: Path) -> dict[str, bytes]:
        """The files that would tell others where the base lies on this machine, without that."""
        if isinstance(self.record, Manifest):
            current = read_stored(folder).digest is not None
            return {} if current else _manifest_and_provenance(self.record, folder)  # format 1 had the whole path
        if isinstance(self.record, Exported) and is_path(self.record.base.name):
            return self._texts(base_name(self.record.base.name), folder)
        return {}

    def _texts(self, base: str, folder: Path) -> dict[str, bytes]:
        """An adapter's own texts, with another name for the base."""
        assert isinstance(self.record, Exported)
        names = (name for name in formats.get(self.record.format).files if not name.endswith(WEIGHTS))
        return {name: renamed_base(folder / name, self.record.base.name, base) for name in names}


def _manifest_and_provenance(manifest: Manifest, folder: Path) -> dict[str, bytes]:
    """Both of a patch's files that say what it is, for the tensors in `folder`."""
    files = {name: digest for name, digest in digests_of(folder).items() if name != PROVENANCE}
    statement = provenance_text(manifest, files).encode()
    files[PROVENANCE] = hashlib.sha256(statement).hexdigest()
    return {PROVENANCE: statement, "manifest.json": manifest_text(manifest, files).encode()}


def _json(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def _read(folder: Path) -> _Content:
    finish_folder(folder)
    kind = kind_of({mark for mark in marks() if (folder / mark).is_file()})
    if kind == "patch":
        return _Content(kind, Patch.load(folder).manifest)  # reads the tensors: a damaged patch is not published
    if kind is None or not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: no patch, and no {MANIFEST} of `patchkit export` or `patchkit merge` in it")
    form = Exported if kind == "adapter" else Merged
    try:
        return _Content(kind, form.model_validate_json((folder / MANIFEST).read_bytes()))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{folder / MANIFEST}: {where}: damaged, or made by another version of patchkit") from None


def _files(folder: Path, kind: Kind) -> dict[str, Path]:
    if kind != "merged":  # beside them may lie what is nobody's business, such as rejected facts
        exported = (file for form in formats.available().values() for file in form.files)
        found = {name: folder / name for name in (*PATCH_FILES, *exported, MANIFEST) if (folder / name).is_file()}
        if links := [path for path in found.values() if leads_out(path, folder)]:
            raise InputError(f"{links[0]}: a link to {links[0].resolve()}; put the file itself here")
        return found
    return {name.as_posix(): folder / name for name in visible_files(folder)}


def _terms(cards: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The license as the first card that is there states it, and the files with the terms that lie beside that card."""
    card = next((path for path in cards if path.is_file()), None)
    if card is None:
        return {}, {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    license = {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    terms = (path for form in _TERMS for path in card.parent.glob(form))
    return license, {path.name: path for path in terms if path.is_file() and not leads_out(path, card.parent)}


def _cards(base: str, commit: str | None, online: bool) -> list[Path]:
    """Where the base's card may lie."""
    if Path(base).is_absolute():  # noted here; a path that only a manifest names is relative
        return [Path(base) / "README.md"]
    if not is_repo_name(base):
        return []
    cached = try_to_load_from_cache(base, "README.md", revision=commit)
    if isinstance(cached, str):
        return [Path(cached)]
    try:
        return [Path(hf_hub_download(base, "README.md", revision=commit))] if online else []
    except OSError:  # no card, or none for us: then the license stays unsaid
        return []


def _check_name(repo: str) -> None:
    if not is_repo_name(repo):
        raise InputError(f"{repo}: not the name of a Hub repository; give user/repo")


def _link_parents(api: HfApi, package: Package, repo: str, say: Say) -> None:
    owner = repo.partition("/")[0]
    names = {parent.partition("@")[0] for manifest in package.manifests for parent in manifest.parents}
    for parent in sorted(name for name in names if is_repo_name(name) and name != repo):
        if parent.partition("/")[0] != owner:
            continue  # other people's cards are theirs to change
        try:
            with hub_errors(parent):
                _link(api, parent, repo)
        except PatchkitError as error:
            say(f"note: its card does not link to the new version: {error}")


def _link(api: HfApi, parent: str, repo: str) -> None:
    # Not metadata_update, which asks huggingface.co to validate the card, whatever the endpoint is.
    here = api.model_info(parent)
    card = ModelCard.load(hf_hub_download(parent, "README.md", revision=here.sha))
    card.data.new_version = repo
    changed = [CommitOperationAdd("README.md", str(card).encode())]
    api.create_commit(parent, changed, commit_message=f"New version: {repo}", parent_commit=here.sha)
