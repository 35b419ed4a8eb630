"""An exported adapter loaded into a vLLM server that is running (VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from patchkit.errors import InputError, PatchkitError

_TIMEOUT = 120  # seconds; the server reads the adapter's files before it answers


def check_server(url: str) -> None:
    """Raises InputError where `url` is not the address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--swap {url}: not the address of a server; write it as http://localhost:8000")


def swap(url: str, folder: str | Path, name: str | None = None) -> str:
    """Have the server at `url` serve the adapter in `folder`, in the place of one of that name; returns the name.

    Args:
        name: the model's name in requests; by default the folder's.

    Raises:
        InputError: it is not the address of a server, or the server refuses.
        PatchkitError: the server cannot be reached.
    """
    check_server(url)
    place = Path(folder).absolute()
    name = name or place.name
    content = {"lora_name": name, "lora_path": str(place), "load_inplace": True}
    where = f"{url.rstrip('/').removesuffix('/v1')}/v1/load_lora_adapter"
    request = urllib.request.Request(
        where, json.dumps(content).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT):
            return name
    except urllib.error.HTTPError as error:
        raise InputError(f"--swap {url}: the server refuses ({error.code}): {_reason(error)}") from None
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        why = getattr(error, "reason", error)
        raise PatchkitError(f"--swap {url}: the server cannot be reached: {why}; the adapter is in {folder}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of it, in one line."""
    text = error.read().decode("utf-8", "replace").strip()
    try:
        said = json.loads(text)
        text = str(said.get("message") or said.get("error", {}).get("message") or said.get("detail") or text)
    except (ValueError, AttributeError):
        pass
    if error.code == 404:
        return "it loads no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
    return (text.splitlines() or ["no reason given"])[0][:300]
