"""`patchkit serve`: an OpenAI-compatible endpoint for trying patches."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import PurePath

import click

from patchkit.cli.common import ModelOptions, model_options, note, stdout
from patchkit.errors import InputError, given_twice


@click.command("serve")
@model_options
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="[NAME=]P",
    help="A patch's folder or Hub repository, served as BASE@NAME; may be repeated. NAME is its last part by default.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
def command(
    model: ModelOptions,
    patches: tuple[str, ...],
    host: str,
    port: int,
) -> None:
    """Serve a model with patches as OpenAI's API does: chat and text completions, streamed or not.

    A request's model is BASE, BASE@PATCH or BASE@ONE+OTHER. One request is answered at a time. Patches are loaded and
    taken off while it runs by POST to /v1/load_lora_adapter and /v1/unload_lora_adapter, as in vLLM.
    """
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise InputError('serve: starlette and uvicorn are missing; pip install "patchkit-lm[serve]"')
    from patchkit.patch.card import base_name
    from patchkit.patch.patch import Patch
    from patchkit.serve.server import Served, listen
    from patchkit.serve.talker import Talker

    named = {name: Patch.load(where) for name, where in _places(patches).items()}
    chosen = model.choice(next((patch.manifest.base for patch in named.values()), None))
    loaded = chosen.load(packed=True)
    talker = Talker(loaded.model, loaded.tokenizer)
    for name, patch in named.items():
        talker.load(name, patch)
    served = Served(talker, base_name(chosen.name))
    for name in served.models():
        stdout.print(f"model {name}", soft_wrap=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        note("whoever reaches this address may load patches from this machine's folders")
    listen(served, host, port, lambda url: stdout.print(f"serving at {url}", soft_wrap=True))


def _places(patches: Sequence[str]) -> dict[str, str]:
    """Where each patch is, by its name."""
    places, given = dict[str, str](), dict[str, str]()
    for text in patches:
        name, where = _named(text)
        if name in places:
            raise given_twice(f"--patch {text}", f"--patch {given[name]}")
        places[name], given[name] = where, text
    return places


def _named(text: str) -> tuple[str, str]:
    name, given, where = text.partition("=")
    name, where = (name, where) if given else (PurePath(text.partition("@")[0]).name, text)
    if not name or set(name) & set("@+/"):
        raise InputError(f"--patch {text}: a name has no @, + or / in it; write --patch NAME=FOLDER")
    return name, where
