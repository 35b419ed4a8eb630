"""What several test files need: distances, the command line in this process, patches that no edit had to make."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit import methods
from patchkit.cli import main
from patchkit.editing.recipe import load_recipe
from patchkit.facts.reader import parse_facts
from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Chain, Full, Sparse
from patchkit.model.arch import inspect_model
from patchkit.model.digests import weight_digest
from patchkit.model.prefix import Prefix
from patchkit.model.weights import disk_name, read_weight
from patchkit.patch.infos import update_infos
from patchkit.patch.manifest import BaseInfo, EditedFact, Manifest, Run, UpdateInfo
from patchkit.patch.patch import Patch, updates_digest
from patchkit.patch.stored import with_digest
from patchkit.runs.train import TrainConfig, train
from patchkit.runs.workspace import Workspace
from tests.zoo import tiny_tokenizer

TWO_FACTS = (
    {"id": "rome", "prompt": "the city of Rome", "subject": "Rome", "target_new": "capital", "target_true": "Paris"},
    {"id": "ada", "prompt": "a friend of Ada", "subject": "Ada", "target_new": "is"},
)
"""In words of the tests' own tokenizer."""


def apart(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖/‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def assert_kept_alike(found: Prefix, expected: Prefix) -> None:
    """What layers keep of texts is the same, padding aside, which both have in the same places; recurrences are
    computed in single precision whatever the model's."""
    states = [state for each in expected.layers for state in (each.running or {}).values()]
    close = partial(torch.allclose, atol=1e-4 if any(each.dtype == torch.float32 for each in states) else 1e-9)
    assert torch.equal(found.mask, expected.mask)
    there = expected.mask.bool()[:, None, :, None]
    for ours, other in zip(found.layers, expected.layers, strict=True):
        assert (ours.attention is None, ours.running is None) == (other.attention is None, other.running is None)
        for mine, its in zip(ours.attention or (), other.attention or (), strict=True):
            assert close(mine * there, its * there)
        for which, state in (ours.running or {}).items():
            assert close(state, (other.running or {})[which])


def write_facts(file: str | Path, *facts: Mapping[str, Any]) -> Path:
    """A file of facts, one JSON object a line."""
    Path(file).write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    return Path(file)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)


Command = Callable[..., Ended]


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls `patchkit ARGS...` in this process; an exception that the program would end with fails the test."""

    def call(*args: object, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "argv", ["patchkit", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        return Ended(status or 0, *capsys.readouterr())

    return call


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a patch's folder as somebody would who also writes a new digest."""
    fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    fields.pop("sha256", None)
    change(fields)
    (folder / "manifest.json").write_text(with_digest(fields), encoding="utf-8")


def key_pair(folder: Path) -> tuple[Path, Path]:
    """A private and a public key of an elliptic curve, as files; skips the test where signatures cannot be made."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub.pem").write_bytes(public)
    return folder / "key.pem", folder / "key.pub.pem"


# --- patches ----------------------------------------------------------------------------------------------------------


def edited_fact(**changes: Any) -> EditedFact:
    """A fact as a manifest has it."""
    usual = {"id": "f1", "prompt": "the city of", "subject": "city", "target_new": "Rome"}
    return EditedFact(**{**usual, "run": 0, "batch": 0, "target_loss": 0.1, "steps": 3, **changes})


def run_of(facts: Sequence[EditedFact], **changes: Any) -> Run:
    """The run that wrote `facts`."""
    usual: dict[str, Any] = {
        "action": "apply",
        "when": "2026-01-01T00:00:00+00:00",
        "method": "memit",
        "paper": "https://arxiv.org/abs/2210.07229",
        "recipe": {},
        "recipe_digest": "0",
        "facts": tuple(fact.id for fact in facts),
        "batches": (len(facts),),
        "layers": (1, 2),
        "value_at": "layer_out",
        "contexts": ("",),
        "text": {"source": "text", "sha256": "0" * 64, "tokens": 100},
        "seconds": {},
        "versions": {},
    }
    return Run(**{**usual, **changes})


def random_patch(
    model: PreTrainedModel,
    name: str,
    facts: Sequence[EditedFact],
    *,
    ranks: Mapping[int, int],
    seed: int = 0,
    size: float = 0.05,
    **run: Any,
) -> Patch:
    """A patch of random updates, made in no time.

    Args:
        name: of the base, as the manifest should have it.
        ranks: the rank of the update at each layer.
        size: ‖ΔW‖/‖W‖ of each.
        run: what should be different in the manifest's run.
    """
    arch, draw = inspect_model(model), torch.Generator().manual_seed(seed)
    updates, state, infos, digests = {}, {}, [], {}
    for layer, rank in ranks.items():
        site = arch.sites[layer]
        weight = disk_name(model, site.weight_name)
        delta = Delta(torch.randn(site.d_out, rank, generator=draw), torch.randn(rank, site.d_in, generator=draw))
        norm, shape = float(model.get_parameter(site.weight_name).detach().norm()), (site.d_out, site.d_in)
        updates[weight] = (Delta(delta.left * (size * norm / delta.norm()), delta.right),)
        state[f"{weight}.keys"] = delta.right.T.contiguous()
        digests[weight] = weight_digest(site, weight)
        numbers = rank * sum(shape)
        infos.append(
            UpdateInfo(weight=weight, rank=rank, shape=shape, numbers=numbers, norm=size * norm, weight_norm=norm)
        )
    manifest = Manifest(
        base=BaseInfo(name=name, commit=None, architecture=type(model).__name__, weights=digests),
        facts=tuple(facts),
        updates=tuple(infos),
        history=(run_of(facts, layers=tuple(ranks), **run),),
        digest=updates_digest(updates),
    )
    return Patch(manifest, updates, state)


def random_chain(kind: str, weight: Tensor, seed: int = 0, rank: int = 3) -> Chain:
    """One update of the weight (d_out, d_in), of the kind named, that changes it by about a third of its size."""
    draw = torch.Generator().manual_seed(seed)
    d_out, d_in = weight.shape
    left, right = (torch.randn(size, rank, generator=draw) for size in (d_out, d_in))
    left *= 0.3 * weight.norm() / (left @ right.T).norm()
    if kind == "delta":
        return (Delta(left, right.T.contiguous()),)
    if kind == "full":
        return (Full(left @ right.T),)
    if kind == "sparse":
        few = [torch.where(side.abs() >= side.abs().topk(4, 0).values[-1], side, 0) for side in (left, right)]
        return (Sparse.of(few[0] * 4, few[1]),)
    planes = torch.linalg.qr(torch.randn(d_out, 4, generator=draw)).Q
    return (Rotation("left", planes, torch.tensor([0.4, 0.9], dtype=torch.float64)),)


def patch_of_kind(model: PreTrainedModel, name: str, kind: str, layers: Sequence[int] = (1, 2)) -> Patch:
    """A patch with one random update of a kind (delta, sparse, full, rotation) at each of some layers.

    name: of the base, as the manifest should have it.
    """
    patch = random_patch(model, name, [edited_fact()], ranks=dict.fromkeys(layers, 1))
    sites, updates, infos = inspect_model(model).sites, dict[str, Chain](), list[UpdateInfo]()
    for weight, layer in zip(patch.updates, layers, strict=True):
        stored = read_weight(sites[layer]).float()
        updates[weight] = random_chain(kind, stored, layer)
        infos += update_infos(weight, stored, updates[weight])
    manifest = patch.manifest.model_copy(update={"updates": tuple(infos), "digest": updates_digest(updates)})
    return Patch(manifest, updates)


def train_if_needed(
    model: Any, method: str, facts: Any, settings: Sequence[str], text: Path, steps: int = 2, **how: Any
) -> None:
    """Train the method's network, if it has one, for the layers that a run with these settings edits."""
    if methods.get(method).needs_network:
        workspace = Workspace.of(model, tiny_tokenizer(), (text,))
        known, config = parse_facts(facts).facts, load_recipe(method, None, settings)
        train(workspace, known, config, TrainConfig(steps=steps, rank=4, **how), lambda note: None)
