"""Keys and current states at the subject's last token, read site by site while earlier sites are being edited."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor

from patchkit.editing.stems import TOKENS, alike, cut
from patchkit.editing.value_problem import ValueAt
from patchkit.facts.requests import EditRequest, pad
from patchkit.model.devices import at, exact, sent, solve_device
from patchkit.model.forward import LayerRunner, watching_input
from patchkit.model.inputs import watching_site
from patchkit.model.prefix import Prefix
from patchkit.model.weights import Site


class SubjectStates:
    """One batch of facts, its prompts cut after the subject's last token, ready to be run again from any layer.

    An edit at layer l changes nothing below l, so each read resumes from the last site read. What prompts begin with in
    common, their stem, is run once, and what is left of them in groups of like length.
    """

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], sites: Sequence[Site], value_at: ValueAt):
        self.runner, self._last, self._contexts = runner, sites[-1], len(requests[0].rows)
        texts = [row.ids[: row.subject + 1] for request in requests for row in request.rows]
        spare = runner.room.a_pass
        stems, own = cut(texts, spare)
        # Padding after a text would go into states that run: there only stems of one length run together.
        stems, alike_in = (sorted(stems, key=len), len) if runner.runs_on else (stems, bool)
        rests = [text[len(stem) :] for text, stem in zip(texts, own, strict=True)]
        number = {stem: place for place, stem in enumerate(stems)}
        groups = alike([len(rest) for rest in rests], spare, lambda some: len(rests[some[-1]]) * len(some) <= TOKENS)
        self._groups = [
            _Group(
                runner,
                value_at,
                [rests[row] for row in rows],
                [number.get(own[row]) for row in rows],
                [place for place, row in enumerate(rows) if row % self._contexts == 0],
            )
            for rows in groups
        ]
        order = torch.tensor([row for rows in groups for row in rows])
        self._order, self._first = (order.argsort(), order[order % self._contexts == 0].argsort())
        self._stems = [_Stems(runner, list(some)) for _, some in groupby(stems, key=alike_in)]
        self._start = 0

    @torch.no_grad()
    def read(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys K (d_in, n) at `site`, averaged over contexts, and the value site's current states (d, n), as a solve
        at `site` takes them: see `solve_device`.

        Edits attached to the model in the meantime act. Sites are read in the order of their layers.
        """
        read = [stems.read(site, self._last, self._start) for stems in self._stems]
        stems = reduce(Prefix.beside, read) if read else None
        found = [group.read(site, self._last, stems, self._start) for group in self._groups]
        self._start, where = site.layer, solve_device(site.module)
        keys, states = (exact(torch.cat(parts), where) for parts in zip(*found, strict=True))
        return at(keys, self._order).unflatten(0, (-1, self._contexts)).mean(1).T, at(states, self._first).T


class _Stems:
    """Stems that run together."""

    def __init__(self, runner: LayerRunner, texts: Sequence[Sequence[int]]) -> None:
        self.runner = runner
        self._ids, self._mask = pad(texts, runner.device)
        self._hidden: Tensor | None = None

    def read(self, site: Site, last: Site, start: int) -> Prefix:
        """What layers keep of them, from layer `start` that is resumed from up to the last site's."""
        entering: list[Tensor] = []
        with watching_input(self.runner.arch.layers[site.layer], entering.append):
            hidden, stop = self._hidden, last.layer + 1
            states = Prefix.read(self.runner, self._ids, self._mask, start=start, hidden=hidden, stop=stop)
        self._hidden = entering[0]
        return states


class _Group:
    """Rows that run together.

    Args:
        rests: their tokens after their stems.
        stems: which stem each has.
        first: those that are prompts without context, whose states count.
    """

    def __init__(
        self,
        runner: LayerRunner,
        value_at: ValueAt,
        rests: Sequence[Sequence[int]],
        stems: Sequence[int | None],
        first: Sequence[int],
    ) -> None:
        self.runner, self.value_at, device = runner, value_at, runner.device
        self._ids, self._mask = pad(rests, device)
        self._stem = sent([stem or 0 for stem in stems], device)  # (rows,)
        self._has_stem = sent([stem is not None for stem in stems], device)
        self._every, self._first = sent(range(len(rests)), device), sent(first, device, torch.long)
        self._hidden: Tensor | None = None

    def read(self, site: Site, last: Site, stems: Prefix | None, start: int) -> tuple[Tensor, Tensor]:
        """Keys (rows, d_in) at `site` and the value site's states (first rows, d), resumed from layer `start`."""
        before = stems and stems.rows(self._stem).seen_by(self._has_stem)
        layer, every, first = self.runner.arch.layers[site.layer], self._every, self._first
        keys, written, entering = list[Tensor](), list[Tensor](), list[Tensor]()
        subjects = self._subjects(every)
        with (
            watching_input(layer, entering.append),
            watching_site(site, len(every), lambda seen, _: keys.append(seen.at(*subjects))),
        ):
            out = self._run(every, before, start, self._hidden, site.layer + 1)
        self._hidden = entering[0]
        if len(first) and (site.layer < last.layer or self.value_at == "module_out"):
            # The last site itself is run once more for what it writes; it is but one layer of a few rows.
            again, entry = (site.layer + 1, out) if site.layer < last.layer else (site.layer, entering[0])
            with watching_site(last, len(first), lambda _, output: written.append(output)):
                out = self._run(first, before, again, at(entry, first), last.layer + 1)
            out = written[0] if self.value_at == "module_out" else out
        else:
            out = at(out, first)
        return keys[0], at(out, *self._subjects(first))

    def _run(self, rows: Tensor, before: Prefix | None, start: int, hidden: Tensor | None, stop: int) -> Tensor:
        """Hidden states (rows, seq, d) of some rows after layer stop - 1."""
        ids, mask = self._ids[rows], self._mask[rows]
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if before is not None:
            inputs = before.rows(rows).inputs(ids, mask)
        out = self.runner.run(inputs, start=start, hidden=hidden, stop=stop).hidden
        assert out is not None
        return out

    def _subjects(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where the subjects' last tokens are in a pass over some rows: numbers of its rows, and positions."""
        ends = self._mask[rows].sum(1) - 1
        return torch.arange(len(rows), device=ends.device), ends
