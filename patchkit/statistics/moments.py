"""Second moments C = E[k k'] of every site's keys over plain text: one pass, resumable, cached.

The text is read in short windows (docs/statistics.md), and a window's first position weighs less than the others.

The pass stops after the last site asked for. Sums are kept in float64; an interrupted run goes on where it stopped.
The cache is keyed by everything that decides the numbers: the weights below the sites, site, text, tokens and dtype.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.files import write_atomically
from patchkit.io.places import shipped
from patchkit.maths.linalg import Covariance
from patchkit.maths.onednn import linear
from patchkit.model.forward import LayerRunner, watching
from patchkit.model.weights import Site, model_digest

# Tokens a window holds. Short, since most of what an edited model is asked is short, and the keys at the beginning of a
# text are unlike those in the middle of one: what is counted here is what edits leave alone (docs/statistics.md).
WINDOW = 32
# What a window's first position weighs beside each other's 1. An attention sink is there, with a key like no other's:
# counted once in every 32 tokens it would be a good part of the energy that methods reckon shares of.
FIRST = 1 / 8
BATCH = 2048  # tokens read together
SAVE_EVERY = 30.0
GRAM_BLOCKS = 8
PACKAGE_TEXT = shipped("data/text.txt")
Progress = Callable[[int, int], None]
Sums = dict[int, Tensor]  # by layer


@dataclass(frozen=True)
class Corpus:
    """Tokenised plain text in windows of at most WINDOW tokens, with the digest of the text it came from."""

    windows: tuple[tuple[int, ...], ...]
    digest: str
    source: str
    bos: tuple[int, ...] = ()  # what each of them begins with

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(len(w) for w in self.windows)

    @property
    def window(self) -> int:
        """Tokens in each but the last."""
        return len(self.windows[0])

    def in_windows(self, window: int) -> Corpus:
        """The same text in windows of another length."""
        ids = [token for each in self.windows for token in each[len(self.bos) :]]
        return replace(self, windows=_windows(ids, self.bos, window))

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest says about it."""
        tokens = {"tokens": self.tokens, "window": self.window}
        return {"source": Path(self.source).name, "sha256": self.digest, **tokens}

    def is_from(self, origin: Mapping[str, Any]) -> bool:
        """Whether it is the same text, read the same way."""
        return all(self.origin[key] == origin.get(key) for key in ("sha256", "window"))

    @property
    def weight(self) -> float:
        """What they weigh together."""
        return self.tokens - (1 - FIRST) * len(self.windows)


def default_text(model_name: str, kind: str = "text") -> Path:
    """The text to use when the user names none: `patchkit-<kind>.txt` in the model's folder, else the package's."""
    beside = Path(model_name) / f"patchkit-{kind}.txt"
    return beside if beside.is_file() else PACKAGE_TEXT.with_name(f"{kind}.txt")


def read_corpus(path: str | Path, tokenizer: Any, tokens: int = 100_000, window: int = WINDOW) -> Corpus:
    """Tokenise at most `tokens` tokens of a UTF-8 text file into windows; each begins with BOS where the model has it.

    Raises:
        InputError: the file cannot be read or holds no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path}: cannot be read: {error}; give a UTF-8 text file") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    if len(ids) < 2 or not text.strip():
        raise InputError(f"text {path}: no text in it; give a file with some thousand words")
    start = tokenizer("a")["input_ids"][:1]
    bos = tuple(start) if start == [tokenizer.bos_token_id] else ()
    return Corpus(_windows(ids, bos, window), hashlib.sha256(text.encode()).hexdigest(), str(path), bos)


def _windows(ids: Sequence[int], bos: tuple[int, ...], window: int) -> tuple[tuple[int, ...], ...]:
    room = window - len(bos)
    return tuple((*bos, *ids[i : i + room]) for i in range(0, len(ids), room))


def window_of(model: PreTrainedModel, window: int = WINDOW) -> int:
    """`window`, or the positions the model has where they are fewer: learned ones end there."""
    return min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)


def cache_folder() -> Path:
    """$PATCHKIT_CACHE, else the user's cache folder for patchkit."""
    return Path(os.environ.get("PATCHKIT_CACHE") or platformdirs.user_cache_dir("patchkit"))


def folder_of(folder: Path, sites: Sequence[Site], corpus: Corpus) -> Path:
    """Where in `folder` is what a text says: `<text digest>-<tokens>x<window>-<dtype>`."""
    dtype = str(next(sites[0].module.parameters()).dtype).removeprefix("torch.")
    return folder / f"{corpus.digest[:16]}-{corpus.tokens}x{corpus.window}-{dtype}"


def statistics(
    runner: LayerRunner,
    sites: Sequence[Site],
    corpus: Corpus,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[int, Covariance]:
    """The covariance of each site, by layer: from `folder` (default: the cache) where it is there, else computed.

    Returns:
        layer -> Covariance, float64 on the CPU, eigendecomposition included.
    """
    place = _StatsFolder(folder or cache_folder() / "stats", runner, sites, corpus)
    missing = [site for site in sites if not place.file(site).is_file()]
    if missing:
        place.root.mkdir(parents=True, exist_ok=True)
        with FileLock(place.root / ".lock"):
            missing = [site for site in missing if not place.file(site).is_file()]
            if missing:
                _compute(runner, missing, corpus, place, progress)
    return {site.layer: place.load(site) for site in sites}


class _StatsFolder:
    """Names and reads the files of one model and one text."""

    def __init__(self, folder: Path, runner: LayerRunner, sites: Sequence[Site], corpus: Corpus) -> None:
        self._digests = _digests_by_layer(runner, max(site.layer for site in sites))
        self._corpus = corpus
        self.root = folder_of(folder, sites, corpus)

    def file(self, site: Site) -> Path:
        """The site's file; its name holds the digest of all weights its keys depend on."""
        return self.root / f"{site.weight_name}-{self._digests[site.layer][:16]}.safetensors"

    def partial(self, sites: Sequence[Site]) -> Path:
        """The unfinished sums of these sites."""
        names = "|".join(str(self.file(site)) for site in sites)
        return self.root / f"partial-{hashlib.sha256(names.encode()).hexdigest()[:16]}.safetensors"

    def load(self, site: Site) -> Covariance:
        """Read one site's covariance with its factorisation."""
        try:
            stored = load_file(self.file(site))
        except SafetensorError as error:
            raise InputError(f"{self.file(site)}: damaged statistics ({error}); delete the file") from None
        covariance = Covariance(stored["second_moment"].double(), self._corpus.tokens)
        covariance.__dict__["eigh"] = (stored["eigenvalues"], stored["eigenvectors"].double())
        return covariance

    def save(self, site: Site, mean: Tensor) -> None:
        """Write one site's mean (d_in, d_in) with its factorisation, done once for all methods and runs."""
        values, vectors = Covariance(mean, self._corpus.tokens).eigh
        tensors = {
            "second_moment": mean.float().contiguous(),
            "eigenvalues": values,
            "eigenvectors": vectors.float().contiguous(),
        }
        write_atomically(self.file(site), lambda path: save_file(tensors, path, {"format": "pt"}))


def _digests_by_layer(runner: LayerRunner, last: int) -> list[str]:
    """Per layer, a digest of every weight its keys depend on: all layers up to it, and what is outside the layers.

    Embeddings of tokens and of positions, and norms and projections after them: which of the decoder's modules act
    before the layers cannot be told by looking, so the final norm counts as well.
    """
    decoder, prefix = runner.arch.model.get_decoder(), runner.arch.layers_name  # type: ignore[operator]
    inside = {id(p) for layer in runner.arch.layers for p in layer.parameters()}
    running = model_digest((name, p) for name, p in decoder.named_parameters() if id(p) not in inside)
    digests = []
    for i in range(last + 1):
        own = model_digest((f"{prefix}.{i}.{name}", p) for name, p in runner.arch.layers[i].named_parameters())
        running = hashlib.sha256(f"{running}{own}".encode()).hexdigest()
        digests.append(running)
    return digests


@torch.no_grad()
def _compute(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, place: _StatsFolder, progress: Progress
) -> None:
    partly = place.partial(sites)
    sums = summed(sites, corpus, partly, partial(_accumulate, runner, sites), progress)
    for site in sites:
        upper = sums[site.layer].cpu() / corpus.weight  # (d_in, d_in)
        place.save(site, upper.triu() + upper.triu(1).T)
    partly.unlink(missing_ok=True)


def summed(
    sites: Sequence[Site],
    corpus: Corpus,
    partly: Path,
    accumulate: Callable[[Sequence[Sequence[int]], Sums], None],
    progress: Progress,
) -> Sums:
    """What `accumulate` adds to each site's sum, over all batches of windows; an interrupted run goes on from what it
    left in `partly`, which is the caller's to delete."""
    sums, done = _resume(partly, sites)
    size = max(1, BATCH // corpus.window)
    batches = [corpus.windows[i : i + size] for i in range(0, len(corpus.windows), size)]
    saved = time.monotonic()
    try:
        for i, batch in enumerate(batches[done:], done):
            progress(sum(len(w) for b in batches[:i] for w in b), corpus.tokens)
            added = dict(sums)  # an interrupt in the middle of a batch leaves `sums` without any of it
            accumulate(batch, added)
            sums, done = added, i + 1
            if time.monotonic() - saved > SAVE_EVERY:
                _save_partial(partly, sums, done)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if done:
            _save_partial(partly, sums, done)
        raise
    progress(corpus.tokens, corpus.tokens)
    return sums


def _accumulate(runner: LayerRunner, sites: Sequence[Site], batch: Sequence[Sequence[int]], sums: Sums) -> None:
    """Add the batch's keys' outer products to each site's sum; equal windows go together, so nothing is padded."""
    last = max(site.layer for site in sites)
    for length in sorted({len(w) for w in batch}):
        ids = torch.tensor([w for w in batch if len(w) == length], device=runner.device)
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(watching(site.module, len(ids), _adder(sums, site.layer)))
            runner.run({"input_ids": ids, "use_cache": False}, stop=last + 1)


def _upper_gram(keys: Tensor) -> Tensor:
    """keys.T @ keys, (d_in, d_in), right on and above the diagonal, in little more than half the time."""
    rows = keys.T.contiguous()  # (d_in, tokens)
    gram = rows.new_zeros(len(rows), len(rows))
    step = -(-len(rows) // GRAM_BLOCKS)
    for first in range(0, len(rows), step):
        gram[first : first + step, first:] = linear(rows[first : first + step], rows[first:])
    return gram


def _adder(sums: Sums, layer: int) -> Callable[[Tensor, Tensor], None]:
    def add(keys: Tensor, _: Tensor) -> None:
        keys = keys.float()  # (windows, positions, d_in)
        keys = torch.cat([FIRST**0.5 * keys[:, :1], keys[:, 1:]], 1)
        gram = _upper_gram(keys.flatten(0, 1))
        sums[layer] = sums[layer] + gram if layer in sums else gram.double()

    return add


def _save_partial(path: Path, sums: Sums, done: int) -> None:
    tensors = {str(layer): total.cpu() for layer, total in sums.items()} | {"done": torch.tensor(done)}
    write_atomically(path, lambda p: save_file(tensors, p, {"format": "pt"}))


def _resume(path: Path, sites: Sequence[Site]) -> tuple[Sums, int]:
    if not path.is_file():
        return {}, 0
    stored = load_file(path)
    devices = {site.layer: next(site.module.parameters()).device for site in sites}
    return {layer: stored[str(layer)].to(device) for layer, device in devices.items()}, int(stored["done"])
