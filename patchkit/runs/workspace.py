"""What runs work with: an inspected model, its tokenizer, and plain text with its statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from patchkit import methods
from patchkit.editing.editor import Progress
from patchkit.editing.recipe import EditConfig
from patchkit.editing.room import Room, rooms
from patchkit.editing.wordings import template_for
from patchkit.errors import InputError
from patchkit.maths.covariance import Covariance
from patchkit.methods import NOTHING, Beside, Method
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.weights import Site
from patchkit.patch.patch import Patch
from patchkit.patch.resolve import Sites, StatisticsOf, with_again, without
from patchkit.patch.superseded import Waiting
from patchkit.statistics.corpus import Corpus, TextRecord, default_text, read_corpus, window_of
from patchkit.statistics.moments import statistics
from patchkit.statistics.networks import digest_of, network_for
from patchkit.statistics.text_gradients import text_curvatures, text_gradients

LayerStatistics = tuple[dict[int, Covariance], dict[int, Beside]]
"""By layer: covariances of the keys of plain text, and what the method has asked for beside them."""


@dataclass(frozen=True)
class Workspace:
    """A model that was inspected once, for everything that is done with it.

    Attributes:
        runner: runs the model; `runner.arch` says where its sites are.
        texts: plain texts for statistics, the one to use for new runs first, the model's default one last.
        stats: folder of the statistics instead of the user's cache.
        progress: called with (phase, done, total).
    """

    runner: LayerRunner
    tokenizer: Any
    texts: Sequence[Path]
    stats: Path | None
    progress: Progress

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[str | Path | None] = (),
        stats: str | Path | None = None,
        progress: Progress = lambda phase, done, total: None,
    ) -> Workspace:
        """Inspect `model`.

        Raises:
            InputError: a model that cannot be edited.
        """
        known = [Path(text) for text in (*texts, default_text(str(model.config._name_or_path))) if text]
        return cls(LayerRunner(inspect_model(model)), tokenizer, known, Path(stats) if stats else None, progress)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        model = self.runner.arch.model
        assert isinstance(model, PreTrainedModel)
        return model

    def corpus(self, text: Path, chat: bool) -> Corpus:
        """The text, tokenized; with `chat` also as conversations, where the tokenizer has a chat template."""
        return read_corpus(text, self.tokenizer, window=window_of(self.model), chat=chat)

    def statistics(
        self, method: Method, sites: Sequence[Site], corpus: Corpus, neurons: bool = False
    ) -> LayerStatistics:
        """Those statistics of the text that `method` needs, or own `neurons` do, stored ones where there are any."""
        covariances, beside = dict[int, Covariance](), {site.layer: NOTHING for site in sites}
        if method.needs_statistics or neurons:
            covariances = statistics(self.runner, sites, corpus, self.stats, self._reporter("statistics"))
        if method.needs_gradients:
            found = text_gradients(self.runner, sites, corpus, self.stats, self._reporter("gradients"))
            beside = {layer: replace(beside[layer], gradient=each.left) for layer, each in found.items()}
        if method.needs_curvature:
            curved = text_curvatures(self.runner, sites, corpus, self.stats, self._reporter("curvature"))
            beside = {layer: replace(beside[layer], curvature=each) for layer, each in curved.items()}
        if method.needs_network:
            beside |= self.networks(method, sites)
        return covariances, beside

    def networks(self, method: Method, sites: Sequence[Site]) -> dict[int, Beside]:
        """The network that was trained for the method at these sites, by layer; raises InputError without one."""
        found = network_for(self.model, sites, method.name, self.stats)
        digest = digest_of(found)
        return {layer: Beside(network=each, digest=digest) for layer, each in found.items()}

    def rooms(
        self, config: EditConfig, sites: Sequence[Site], covariances: Mapping[int, Covariance], corpus: Corpus
    ) -> dict[int, Room]:
        """By layer, which neurons subjects may have for their own, where the recipe gives them any."""
        if config.neurons != "on":
            return {}
        chat = template_for(self.tokenizer, config)
        return rooms(self.runner, self.tokenizer, sites, covariances, corpus, chat, self.stats)

    def without(self, patch: Patch, gone: Collection[str], sites: Sites, waiting: Sequence[Waiting]) -> Patch:
        """The patch without the facts in `gone`, solved again with the statistics that its runs had; `waiting` as in
        `patchkit.patch.resolve.without`.

        Raises:
            InputError: the text that a run took its statistics from is not among the texts.
        """
        return without(patch, gone, sites, self._statistics_of(patch, sites), waiting) if gone else patch

    def with_again(self, patch: Patch, back: Sequence[Waiting], sites: Sites, waiting: Sequence[Waiting]) -> Patch:
        """The patch with the superseded facts in `back`; raises as `without`."""
        return with_again(patch, back, sites, self._statistics_of(patch, sites), waiting) if back else patch

    def _statistics_of(self, patch: Patch, sites: Sites) -> StatisticsOf:
        """Finds the statistics of a patch's runs."""

        @cache  # finding statistics takes a digest of the weights below: once for all sites, and for runs alike
        def of_text(text: TextRecord, method: str, layers: tuple[int, ...]) -> LayerStatistics | None:
            readings = (self.corpus(each, chat) for each in self.texts for chat in (False, True))
            found = next((corpus for corpus in readings if corpus.record.same_reading(text)), None)
            edited = [site for site in sites.values() if site.layer in layers and site.solved]
            return None if found is None else self.statistics(methods.get(method), edited, found)

        @cache
        def of_network(method: str, layers: tuple[int, ...]) -> dict[int, Beside]:
            edited = [site for site in sites.values() if site.layer in layers and site.solved]
            return self.networks(methods.get(method), edited)

        def find(number: int, site: Site) -> tuple[Covariance | None, Beside]:
            run = patch.manifest.history[number]
            method = methods.get(run.method)
            if method.needs_network:
                return None, of_network(run.method, run.layers)[site.layer]
            if not method.needs_statistics and not method.needs_gradients:
                return None, NOTHING
            found = of_text(run.text, run.method, run.layers)
            if found is None:
                read = f"sha256 {run.text.sha256[:16]}..., in windows of {run.text.window} tokens"
                raise InputError(
                    f"run {number + 1} took its statistics from the text {run.text.source} "
                    f"({read}), which is not here, or tokenized otherwise now; give it with --text"
                )
            covariances, beside = found
            return covariances.get(site.layer), beside.get(site.layer, NOTHING)

        return find

    def _reporter(self, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(phase, done, total)
