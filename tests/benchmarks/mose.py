"""The ablations of docs/mose.md: sides, values, λ, layers and tolerances, facts edited one after the other.

    python -m tests.benchmarks.mose --model FOLDER --facts FACTS --text TEXT --eval-text TEXT --skip 1000 --count 25

One row for each configuration, printed as it comes, in the columns of the tables there; then the spectrum of angles and
what a patch weighs and does when planes under a tolerance are left out, for the recipes as they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchkit.bench.health import Spectra, site_drift
from patchkit.editing.editor import edit
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.editing.state import EditState
from patchkit.evaluate.readings import EVAL_WINDOW
from patchkit.evaluate.verify import verify
from patchkit.facts.reader import read_facts
from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import delta_of
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import load_model
from patchkit.model.weights import read_weight
from patchkit.statistics.corpus import read_corpus
from patchkit.statistics.moments import statistics

TOLERANCES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "left": ("mose",),
    "left, the paper's free value": ("mose", "values=free"),
    "left, λ = 1": ("mose", "preserve=1"),
    "left, λ = 30": ("mose", "preserve=30"),
    "left, one layer": ("mose", "layers=8"),
    "left, a layer and its neighbors": ("mose", "layers=7-9"),
    "right": ("mose-right",),
    "right, null space of AlphaEdit": ("mose-right", "null_energy=0.3"),
    "right, earlier keys not held": ("mose-right", "earlier=0"),
    "right, one layer": ("mose-right", "layers=8"),
    "AlphaEdit": ("alphaedit",),
}
TITLE = (
    "| | exact | generalization success / exact | locality unchanged | perplexity | norm, condition drift "
    "| patch, % of dense | s |"
)


class Bench:
    """Model, text and facts, and the measurement that every row goes through."""

    def __init__(self, options: argparse.Namespace) -> None:
        loaded = load_model(options.model, options.device)
        self.tokenizer, self.batch = loaded.tokenizer, options.batch
        self.runner = LayerRunner(inspect_model(loaded.model))
        facts = read_facts(options.facts, skip_bad=True, limit=options.skip + options.count).facts
        self.facts = facts[options.skip :]
        self.text = read_corpus(options.text, self.tokenizer)
        self.plain = read_corpus(options.eval_text, self.tokenizer, options.eval_tokens, EVAL_WINDOW)
        self.spectra: Spectra = {}

    def edited(self, name: str, settings: tuple[str, ...]) -> EditState:
        """All facts edited in sequence."""
        config = load_recipe(name, None, (f"batch_size={self.batch}", *settings))
        covariances = statistics(self.runner, plan(self.runner.arch, config).sites, self.text)
        return edit(self.runner, self.tokenizer, self.facts, config, covariances).state

    def row(self, label: str, changes: Mapping[int, Delta], weight: str, seconds: float) -> str:
        """A table's line for weights changed so."""
        arch = self.runner.arch
        report = verify(self.runner, self.tokenizer, self.facts, lambda: live_deltas(arch, dict(changes)), self.plain)
        drifts = [site_drift(arch.sites[layer], delta.dense(), self.spectra) for layer, delta in changes.items()]
        norm, condition = (max(abs(getattr(d, part)) for d in drifts) for part in ("norm", "condition"))
        assert report.perplexity is not None
        cells = (
            label,
            f"{report.efficacy.exact:.2f}",
            f"{report.generalization.success:.2f} / {report.generalization.exact:.2f}",
            f"{report.locality.unchanged:.2f}",
            f"x{report.perplexity.ratio:.3f}",
            f"{norm:.0e}, {condition:.0e}",
            weight,
            f"{seconds:.0f}",
        )
        return f"| {' | '.join(cells)} |"

    def ablate(self, label: str) -> EditState:
        """Edit, measure and print one of `ABLATIONS`."""
        name, *settings = ABLATIONS[label]
        began = time.perf_counter()
        state = self.edited(name, tuple(settings))
        seconds = time.perf_counter() - began
        print(self.row(label, state.deltas(self.runner.arch), share_of_dense(state), seconds), flush=True)
        return state

    def truncate(self, label: str, state: EditState) -> None:
        """Print the angles, and a line for each tolerance."""
        for layer, history in state.sites.items():
            print(f"{label}, layer {layer}: {quantiles(rotation_at(state, layer).spectrum())}")
            assert len(history.chain) == 1
        for tolerance in TOLERANCES:
            cut = {layer: rotation_at(state, layer).truncated(tolerance) for layer in state.sites}
            changes = {layer: delta_of((rotation,), self._weight(layer)) for layer, rotation in cut.items()}
            print(self.row(f"{label}, tolerance {tolerance:g}", changes, share(list(cut.values())), 0), flush=True)

    def _weight(self, layer: int) -> Callable[[], Tensor]:
        return lambda: read_weight(self.runner.arch.sites[layer]).double().cpu()


def rotation_at(state: EditState, layer: int) -> Rotation:
    """What was done at a layer by a method that rotates."""
    rotation = state.sites[layer].chain[0]
    assert isinstance(rotation, Rotation)
    return rotation


def share(rotations: list[Rotation]) -> str:
    """What they take of the bytes of the dense matrices R."""
    stored = sum(rotation.planes.numel() + rotation.angles.numel() for rotation in rotations)
    return f"{100 * stored / sum(rotation.size**2 for rotation in rotations):.1f}"


def share_of_dense(state: EditState) -> str:
    """The same for all layers of a state; nothing for a method that does not rotate."""
    chains = [history.chain for history in state.sites.values()]
    return share([u for chain in chains for u in chain if isinstance(u, Rotation)]) if rotates(state) else "-"


def rotates(state: EditState) -> bool:
    """Whether all that was done are rotations."""
    return all(isinstance(update, Rotation) for history in state.sites.values() for update in history.chain)


def quantiles(angles: Tensor) -> str:
    """How many planes there are, and the angles of some of them, in radians."""
    places = [0, 9, 19, 49, 99, 199]
    found = [f"no. {place + 1} {angles[place]:.1e}" for place in places if place < len(angles)]
    return f"{len(angles)} planes, " + ", ".join(found)


def main() -> None:
    """Parse the options and print the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    print(TITLE, "|---" * 8 + "|", sep="\n", flush=True)
    for label in options.only or ABLATIONS:
        state = bench.ablate(label)
        if label in ("left", "right"):
            bench.truncate(label, state)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--facts", required=True, help="file of facts")
    parser.add_argument("--text", required=True, help="plain text for the statistics")
    parser.add_argument("--eval-text", required=True, help="plain text for the perplexity")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--skip", type=int, default=0, help="facts of the file to pass over")
    parser.add_argument("--count", type=int, default=25, help="facts to edit")
    parser.add_argument("--batch", type=int, default=1, help="facts solved for together")
    parser.add_argument("--only", action="append", choices=list(ABLATIONS), help="this row; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
