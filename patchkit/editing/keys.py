"""Keys and current states at the subject's last token, read site by site while earlier sites are being edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchkit.editing.suffixes import common_start
from patchkit.editing.value_problem import ValueAt
from patchkit.facts.requests import EditRequest, pad
from patchkit.model.devices import at, exact, sent, solve_device
from patchkit.model.forward import LayerRunner, Prefix, watching_input
from patchkit.model.inputs import watching_site
from patchkit.model.weights import Site


class SubjectStates:
    """One batch of facts, its prompts cut after the subject's last token, ready to be run again from any layer.

    An edit at layer l changes nothing below l, so each read resumes from the last site read. The common prefix of all
    facts' prompts after one context, the stem, is run once for all of them.
    """

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], sites: Sequence[Site], value_at: ValueAt):
        self.runner, self.sites, self.value_at = runner, sites, value_at
        self.contexts = len(requests[0].rows)
        alike = zip(*(request.rows for request in requests), strict=True)
        stems = [common_start([row.prefix for row in rows]) if len(requests) > 1 else () for rows in alike]
        self._stems = pad(stems, runner.device) if any(stems) else None
        rows = [(row, len(stem)) for request in requests for row, stem in zip(request.rows, stems, strict=True)]
        self._ids, self._mask = pad([row.ids[shared : row.subject + 1] for row, shared in rows], runner.device)
        self._shared = sent([shared for _, shared in rows], runner.device)  # (rows,)
        self._resume: tuple[int, Tensor | None, Tensor | None] = (0, None, None)

    @torch.no_grad()
    def read(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys K (d_in, n) at `site`, averaged over contexts, and the value site's current states (d, n), as a solve
        at `site` takes them: see `solve_device`.

        Edits attached to the model in the meantime act. Sites are read in the order of their layers.
        """
        start, _, hidden = self._resume
        layer, last = self.runner.arch.layers[site.layer], self.sites[-1]
        every = torch.arange(len(self._ids), device=self._ids.device)
        first = every[:: self.contexts]  # the prompts without context, whose states count
        keys: list[Tensor] = []
        written: list[Tensor] = []
        entering: list[Tensor] = []
        with watching_input(layer, entering.append):
            before = self._stem_states(start, last.layer + 1, len(every))
            with watching_site(site, len(every), lambda seen, _: keys.append(seen.at(*self._subjects(every)))):
                out = self._run(every, before, start, hidden, site.layer + 1)
        self._resume = (site.layer, entering[0], entering[-1])
        if site.layer < last.layer or self.value_at == "module_out":
            # The last site itself is run once more for what it writes; it is but one layer of a few rows.
            again, entry = (site.layer + 1, out) if site.layer < last.layer else (site.layer, entering[-1])
            with watching_site(last, len(first), lambda _, output: written.append(output)):
                out = self._run(first, before, again, at(entry, first), last.layer + 1)
        else:
            out = at(out, first)
        state = self._at_subject(written[0] if self.value_at == "module_out" else out, first)
        where = solve_device(site.module)
        return exact(keys[0], where).unflatten(0, (-1, self.contexts)).mean(1).T, exact(state, where).T

    def _stem_states(self, start: int, stop: int, rows: int) -> Prefix | None:
        """KV cache of the stems in layers start..stop-1, one per row, or None where nothing is shared."""
        if self._stems is None:
            return None
        states = Prefix.read(self.runner, *self._stems, start=start, hidden=self._resume[1], stop=stop)
        return states.rows(torch.arange(rows, device=self._ids.device) % self.contexts)

    def _run(self, rows: Tensor, before: Prefix | None, start: int, hidden: Tensor | None, stop: int) -> Tensor:
        """Hidden states (rows, seq, d) of some rows after layer stop - 1."""
        mask, shared = self._mask[rows], self._shared[rows].unsqueeze(1)
        inputs: dict[str, Any] = {"input_ids": self._ids[rows], "attention_mask": mask, "use_cache": False}
        if before is not None:
            known = before.rows(rows)
            inputs |= {"attention_mask": torch.cat([known.mask, mask], 1), "past_key_values": known.cache()}
            inputs |= {"position_ids": shared + torch.arange(mask.shape[1], device=mask.device), "use_cache": True}
        out = self.runner.run(inputs, start=start, hidden=hidden, stop=stop).hidden
        assert out is not None
        return out

    def _at_subject(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return at(hidden, *self._subjects(rows))  # (rows, d)

    def _subjects(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where the subjects' last tokens are in a pass over some rows: numbers of its rows, and positions."""
        ends = self._mask[rows].sum(1) - 1
        return torch.arange(len(rows), device=ends.device), ends
