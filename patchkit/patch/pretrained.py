"""A model and a patch in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.hub import is_repo_name
from patchkit.patch.bases import base_to_load
from patchkit.patch.patch import Patch
from patchkit.patch.stack import load, name_of, opened


def from_pretrained(
    patch: str | Path | Patch,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    merged: bool = False,
    force: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load the base that `patch` names, at the commit that it names, and attach the patch.

    Args:
        patch: as in `load`.
        base: a folder or Hub name of the base, in place of the patch's.
        name: as in `load`.
        merged: as in `load`.
        force: as in `load`.
        options: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, quantization_config and so on. Code that
            comes with the base runs only with trust_remote_code=True, and only if `base` is given.

    Returns:
        The model, with its patches as `model.patchkit`, and its tokenizer.

    Raises:
        InputError: as in `load`, or the base cannot be loaded.

    Examples:
        >>> patched, tokenizer = patchkit.from_pretrained(folder)  # a patch's folder
        >>> len(patched.patchkit.active)
        1
    """
    read = opened(patch)
    if base is None and options.get("trust_remote_code"):
        raise InputError("trust_remote_code=True: runs whatever code comes with a model; say which one with base=")
    where = str(base or base_to_load(read.manifest.base.name, "base="))
    if not Path(where).exists() and not is_repo_name(where) and "/" in where:
        raise InputError(f"base model {where}: no such folder; base= says where else it is")
    if base is None and not Path(where).exists():
        options = {"revision": read.manifest.base.commit, **options}
    options = {"trust_remote_code": False, **options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=options.get("revision"), trust_remote_code=options["trust_remote_code"]
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"base model {where}: cannot be loaded: {reason}; base= says where else it is") from None
    load(model, read, name or name_of(patch), merged=merged, force=force)
    return model, tokenizer
