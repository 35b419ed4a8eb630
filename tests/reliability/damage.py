"""Patches damaged and forged at random: what is done to their folders, and all that may then be asked of them."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import patchkit
from patchkit import Patch, PatchkitError
from patchkit.cli.common import HarmlessConsole
from patchkit.cli.tables import diff_table, log_table, patch_table
from patchkit.patch.card import model_card
from patchkit.patch.history import choose_facts, difference
from patchkit.patch.patch import updates_digest
from patchkit.patch.stored import digests_of, parsed, read_stored, with_digest
from patchkit.patch.tensors import updates_in
from patchkit.runs.execute import take_out
from patchkit.runs.workspace import Workspace
from tests import zoo

FILES = ("manifest.json", "patch.safetensors", "state.safetensors", "provenance.json")
ODD = (
    *(None, True, False, 0, 1, -1, 2, 10**9, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x" * 5000,
        "\x1b[31m",
        "\u202e",
        "../../x",
        "/etc/passwd",
        "<img src=x>",
        "![x](http://a)",
        "2026-13-45",
    ),
    *([], {}, [[]], [None], {"a": 1}, [0, 0], [-1, 5], ["a", "a"], "memit", "mose", "ft", "rotation", "sparse", "left"),
)
Random = random.Random


@dataclass(frozen=True)
class Place:
    """A patch that was applied twice and corrected, with what is needed to use it."""

    original: Path
    other: Path
    workspace: Workspace

    @classmethod
    def made(cls, folder: Path) -> Place:
        """Make it, and another patch of the same base, in a folder."""
        model, tokenizer = zoo.FAMILIES["llama"](), zoo.tiny_tokenizer()
        text = folder / "text.txt"
        text.write_text("Ada Lovelace was born in London. The city of Rome is old. " * 40, encoding="utf-8")
        how: dict[str, Any] = {"overrides": ("contexts=0", "value.steps=2", "layers=1-2"), "text": text}
        first = patchkit.apply(model, tokenizer, [fact("rome", "is"), fact("ada", "Paris")], method="memit", **how)
        second = [fact("rome-2", "Berlin", "the city of rome"), fact("alan", "true")]
        patch = patchkit.apply(model, tokenizer, second, method="memit", onto=first, **how)
        patch.save(folder / "original")
        patchkit.apply(model, tokenizer, [fact("eve", "true")], method="rome", **how).save(folder / "other")
        return cls(folder / "original", folder / "other", Workspace.of(model, tokenizer, (text,)))

    def use(self, folder: Path, go_on: bool = True) -> Patch | None:
        """Ask everything of the patch in `folder`; None where it is refused, and nothing else may be raised.

        go_on: write another fact onto it as well, which takes longest.
        """
        try:
            patch = Patch.load(folder)
            self._show(folder, patch)
            with patch.attached(self.workspace.model):
                pass
            take_out(self.workspace, patch, choose_facts(patch.manifest, (), None, 1))
            if go_on:
                how: dict[str, Any] = {"overrides": ("value.steps=1", "contexts=0"), "text": self.workspace.texts[0]}
                new, model = fact("zoe", "true"), self.workspace.model
                patchkit.apply(model, self.workspace.tokenizer, [new], onto=patch, **how)
        except PatchkitError as error:
            told = str(error)
            assert told.strip()
            assert len(told) < 3000
            return None
        return patch

    def _show(self, folder: Path, patch: Patch) -> None:
        console = HarmlessConsole(file=io.StringIO(), width=100, markup=False)
        console.print(patch_table(read_stored(folder)))
        console.print(log_table(patch.manifest))
        console.print(diff_table(difference(patch.manifest, Patch.load(self.original).manifest), "a", "b"))
        assert isinstance(console.file, io.StringIO)
        assert not set(console.file.getvalue()) & set("\x1b\x07\r\u202e")
        assert model_card(patch.manifest, "title")


def fact(name: str, target: str, prompt: str | None = None) -> dict[str, Any]:
    """A fact with an id."""
    subject = {"rome-2": "rome"}.get(name, name)
    return {"id": name, "prompt": prompt or f"the city of {subject}", "subject": subject, "target_new": target}


# --- damage: the digests stay as they were ----------------------------------------------------------------------------


def flipped(file: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def damage(draw: Random, folder: Path, other: Path) -> str:
    """Something that happens to files; what it was."""
    name = draw.choice(FILES)
    file = folder / name
    kinds: dict[str, Callable[[], object]] = {
        "bits": lambda: [flipped(file, draw.randrange(8 * file.stat().st_size)) for _ in range(draw.randint(1, 20))],
        "cut": lambda: os.truncate(file, draw.randrange(file.stat().st_size)),
        "longer": lambda: file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 50))),
        "bytes": lambda: _overwritten(draw, file),
        "other's": lambda: shutil.copyfile(other / name, file),
        "gone": file.unlink,
        "folder": lambda: (file.unlink(), file.mkdir()),
        "pipe": lambda: (file.unlink(), os.mkfifo(file)),
        "link": lambda: (file.unlink(), file.symlink_to(draw.choice(["/dev/zero", "/nowhere", str(other / name)]))),
        "values": lambda: _changed_values(draw, folder),
        "tensors": lambda: _changed_tensors(draw, folder),
    }
    kind = draw.choice(list(kinds))
    kinds[kind]()
    return f"{kind} of {name}"


def _overwritten(draw: Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + draw.randint(1, 30)] = draw.randbytes(draw.randint(0, 30))
    file.write_bytes(bytes(data))


def _changed_values(draw: Random, folder: Path) -> None:
    file = folder / "manifest.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    change(draw, fields)
    file.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value of JSON with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def change(draw: Random, fields: dict[str, Any]) -> None:
    """Change a few values at any depth: replaced by odd ones or by each other, dropped, doubled, renamed."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(fields))
        inside, key = draw.choice(found)
        if key not in inside if isinstance(inside, dict) else key >= len(inside):
            continue
        kind = draw.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, list):
            inside.insert(key, inside[draw.randrange(len(inside))])
        elif kind == 2:
            from_inside, from_key = draw.choice(found)
            inside[key] = json.loads(json.dumps(from_inside[from_key], default=str))
        elif kind == 3 and isinstance(inside, dict):
            inside[draw.choice(("x", "", "sweeps", "layers", "method", "\x1b[2J"))] = inside.pop(key)
        elif kind == 4 and isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
            inside[key] = draw.choice((inside[key] + 1, -inside[key], inside[key] * 1000, inside[key] - 1))
        else:
            inside[key] = draw.choice(ODD)


def _changed_tensors(draw: Random, folder: Path) -> str:
    file = folder / draw.choice(("patch.safetensors", "state.safetensors"))
    tensors = load_file(file)
    name = draw.choice(list(tensors))
    tensor = tensors.pop(name)
    changes: dict[str, Callable[[], Tensor | None]] = {
        "nan": lambda: torch.full_like(tensor, float("nan")),
        "infinite": lambda: tensor * float("inf"),
        "transposed": lambda: tensor.T.contiguous(),
        "narrower": lambda: tensor[:, 1:].contiguous(),
        "shorter": lambda: tensor[1:].contiguous(),
        "wider": lambda: torch.cat([tensor, tensor[:, :1]], 1),
        "flat": lambda: tensor.flatten(),
        "half": lambda: tensor.half(),
        "whole numbers": lambda: tensor.int(),
        "none": lambda: tensor[:0].contiguous(),
        "larger": lambda: tensor * 1e30,
        "other": lambda: torch.randn_like(tensor),
        "gone": lambda: None,
    }
    kind = draw.choice(list(changes))
    if (new := changes[kind]()) is not None:
        tensors[draw.choice((name, name, name, f"{name}x"))] = new
    save_file(tensors, file, {"format": "pt"})
    return kind


# --- forgery: digests are written anew --------------------------------------------------------------------------------


def forge(draw: Random, folder: Path) -> str:
    """Change the manifest or the tensors and write digests that say so."""
    kind = draw.choice(("values", "values", "values", "tensors"))
    if kind == "tensors":
        kind = _changed_tensors(draw, folder)
    fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    fields.pop("sha256")
    if kind == "values":
        change(draw, fields)
    if isinstance(fields.get("files"), dict):
        fields["files"] = digests_of(folder)
    text = with_digest(fields)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    _new_identity(folder, fields)
    return kind


def _new_identity(folder: Path, fields: dict[str, Any]) -> None:
    """The digest of the tensors, where they are those of the manifest."""
    try:
        manifest = parsed((folder / "manifest.json").read_bytes(), "").manifest
        digest = updates_digest(updates_in(manifest, load_file(folder / "patch.safetensors"), folder))
    except (PatchkitError, OSError):
        return
    (folder / "manifest.json").write_text(with_digest({**fields, "digest": digest}), encoding="utf-8")


def same(found: Patch, original: Patch) -> bool:
    """Whether a patch has the facts, the weights and, if any, the state of the original."""
    return (
        found.manifest == original.manifest
        and updates_digest(found.updates) == updates_digest(original.updates)
        and (not found.state or found.state.keys() == original.state.keys())
        and all(torch.equal(tensor, original.state[name]) for name, tensor in found.state.items())
    )


def fresh(place: Place, folder: Path) -> Path:
    """The original once more, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.original, folder)
    return folder
