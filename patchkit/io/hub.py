"""Patches by their name on the Hub, and whatever goes wrong with the Hub in one line.

Tokens, retries and the cache are huggingface_hub's; nothing here ever sees a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from patchkit.errors import InputError, PatchkitError

PATCH_FILES = (
    *("manifest.json", "patch.safetensors", "state.safetensors", "provenance.json", "patch.sig"),
    "README.md",
)
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[
    1
]  # of httpx or httpx2, whichever this huggingface_hub is built on


def patch_folder(name: str | Path, *, manifest_only: bool = False) -> Path:
    """The folder of a patch: `name` itself, else what the Hub repository "user/repo" or "user/repo@revision" holds.

    Raises:
        InputError: neither is there, or it may not be read.
        PatchkitError: the Hub cannot be reached, and the patch is not in the cache.
    """
    folder = Path(name)
    if folder.exists():
        return folder
    repo, _, revision = folder.as_posix().partition("@")
    if not is_repo_name(repo):
        raise InputError(f"{name}: no such folder, and not the name of a Hub repository (user/repo) either")
    if not revision and folder.parent.name and folder.parent.is_dir():
        raise InputError(f"{name}: no such folder in {folder.parent}; of a Hub repository say the branch, {repo}@main")
    return pull(repo, revision or None, manifest_only=manifest_only)


def pull(repo: str, revision: str | None = None, *, manifest_only: bool = False) -> Path:
    """Fetch a patch, or only its manifest, into the Hub's cache; what is there already is not fetched again.

    Raises:
        InputError, PatchkitError: as in `patch_folder`, or the repository holds no patch.
    """
    with hub_errors(repo):
        wanted = PATCH_FILES[:1] if manifest_only else PATCH_FILES
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{repo}: this Hub repository is not a patch, there is no manifest.json in it")
    return folder


def is_repo_name(name: str) -> bool:
    """Whether it has the form user/repo."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def ask_once(repo: str, file: str, *, repo_type: str | None = None, revision: str | None = None) -> None:
    """Ask the Hub for a file that is not in the cache, once: loading it would ask again and again where nobody answers.

    Raises:
        InputError, PatchkitError: as in `hub_errors`.
    """
    with hub_errors(repo):
        if not isinstance(try_to_load_from_cache(repo, file, revision=revision, repo_type=repo_type), str):
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision, repo_type=repo_type), timeout=10)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line.

    Raises:
        InputError: something the user can put right: the name, the revision, the rights.
        PatchkitError: the network or the Hub failed.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise _answered(repo, error) from None
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise InputError(f"{repo}: {_first_line(error)}") from None
    except OfflineModeIsEnabled:
        raise PatchkitError(f"{repo}: the Hub is out of bounds, HF_HUB_OFFLINE is set") from None
    except LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, OfflineModeIsEnabled) or "HF_HUB_OFFLINE" in str(error)
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise PatchkitError(f"{repo}: no such folder, not in the Hub's local cache, and {why}") from None
    except (_HTTP_ERROR, ConnectionError, TimeoutError) as error:
        raise PatchkitError(f"{repo}: the Hub cannot be reached: {_first_line(error)}; try again later") from None


def _answered(repo: str, error: HfHubHTTPError) -> PatchkitError:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return InputError(f"{repo}: access is gated; ask for it on its Hub page, and log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{repo}: no such folder, and no such repository on the Hub, or a private one; `hf auth login` logs in"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{repo}: the Hub repository has no such revision")
    if status in (401, 403):
        return InputError(
            f"{repo}: the Hub refuses ({status}): log in with `hf auth login`, with a token that may write"
        )
    if status in (409, 412):
        return PatchkitError(f"{repo}: somebody else changed it meanwhile; nothing was published, push again")
    return PatchkitError(f"{repo}: the Hub answered {status}: {error.server_message or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
