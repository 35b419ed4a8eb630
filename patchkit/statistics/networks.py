"""Networks that methods train once for a model, kept beside the statistics and verified when loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.checked import Damaged, read_checked, write_checked
from patchkit.io.places import cache_folder
from patchkit.model.digests import model_digest, tensor_digest
from patchkit.model.weights import Site, stored_parameters

_VERSION = 1


class Training(BaseModel):
    """Everything that decides a training but its length, so that a shorter one can be gone on from.

    model: digest of all its weights. layers: the sites, ascending. facts, text: digests of what it was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str
    model: str
    dtype: str
    layers: tuple[int, ...]
    facts: str
    text: str
    rank: int
    learning_rate: float
    edit_weight: float
    recipe: str
    seed: int
    version: int = _VERSION


class NetworkFile:
    """The file of a method's network for the sites of one model, and the unfinished one beside it.

    finished: what `apply` loads. partial: with the optimizer's state, to go on from; it stays, so that a longer
    training goes on from a shorter one.
    """

    def __init__(self, folder: Path | None, method: str, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        self.model = model_digest(stored_parameters(model))
        self.dtype = str(sites[0].dtype).removeprefix("torch.")
        self.layers = tuple(sorted(site.layer for site in sites))
        made = hashlib.sha256(f"{method} {self.model} {self.dtype} {self.layers}".encode()).hexdigest()[:16]
        self.finished = (folder or cache_folder() / "stats") / "networks" / f"{method}-{made}.safetensors"
        self.partial = self.finished.with_name(f"{method}-{made}.partial.safetensors")

    def load(self) -> dict[int, dict[str, Tensor]] | None:
        """The trained network by layer; None where there is none.

        Raises:
            InputError: the file is damaged.
        """
        if not self.finished.is_file():
            return None
        try:
            _, stored = read_checked(self.finished)
        except Damaged as error:
            raise InputError(f"{error}; remove it and train again") from None
        found: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.layers}
        for name, tensor in stored.items():
            layer, _, part = name.partition(".")
            found[int(layer)][part] = tensor.read()
        return found

    def save(self, training: Training, steps: int, networks: dict[int, dict[str, Tensor]]) -> None:
        """Keep a finished network."""
        # What sites share is written for each of them, so that a site's part can be read by itself.
        tensors = {f"{layer}.{name}": each.clone() for layer, parts in networks.items() for name, each in parts.items()}
        write_checked(self.finished, tensors, {"training": training.model_dump_json(), "steps": str(steps)})

    def trained(self) -> tuple[Training, int] | None:
        """What the finished network was trained on, and for how many steps; None without one that can be read."""
        try:
            notes, _ = read_checked(self.finished)
            return Training.model_validate_json(notes["training"]), int(notes["steps"])
        except (Damaged, InputError, KeyError, ValueError, ValidationError, OSError):
            return None

    def save_partial(self, training: Training, steps: int, state: dict[str, Tensor]) -> None:
        """Keep the state of a training after so many steps."""
        write_checked(self.partial, state, {"training": training.model_dump_json(), "steps": str(steps)})

    def load_partial(self, training: Training) -> tuple[dict[str, Tensor], int]:
        """The state of that very training and how many steps are in it; none of either where there is no such one."""
        if not self.partial.is_file():
            return {}, 0
        try:
            notes, stored = read_checked(self.partial)
            if Training.model_validate_json(notes["training"]) != training:
                return {}, 0
            return {name: tensor.read() for name, tensor in stored.items()}, int(notes["steps"])
        except (Damaged, KeyError, ValidationError):
            return {}, 0


def digest_of(networks: Mapping[int, Mapping[str, Tensor]]) -> str:
    """sha256 over all tensors, in the order of layers and names: the identity of a training."""
    digest = hashlib.sha256()
    for layer in sorted(networks):
        for name, tensor in sorted(networks[layer].items()):
            digest.update(tensor_digest(f"{layer}.{name}", tensor).encode())
    return digest.hexdigest()


def network_for(
    model: PreTrainedModel, sites: Sequence[Site], method: str, folder: Path | None
) -> dict[int, dict[str, Tensor]]:
    """The network that was trained for these sites of the model, by layer.

    Raises:
        InputError: there is none, or it is damaged.
    """
    file = NetworkFile(folder, method, model, sites)
    found = file.load()
    if found is None:
        layers = ",".join(map(str, file.layers))
        raise InputError(
            f"{method}: no network has been trained for layers {layers} of this model; train one with "
            f"`patchkit train FACTS --method {method}` and the same --model, --layers and --stats"
        )
    return found
