"""Keys and current states at the subject's last token, read site by site while earlier sites are being edited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from patchkit.arch import Site
from patchkit.forward import LayerRunner, watching, watching_input
from patchkit.requests import EditRequest, pad
from patchkit.values import ValueAt


class SubjectStates:
    """One batch of facts, its prompts cut after the subject's last token, ready to be run again from any layer.

    An edit at layer l changes nothing below l, so each read resumes from the last site read.
    """

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], sites: Sequence[Site], value_at: ValueAt):
        self.runner, self.sites, self.value_at = runner, sites, value_at
        rows = [row for request in requests for row in request.rows]
        self.contexts = len(requests[0].rows)
        ids, mask = pad([row.ids[: row.subject + 1] for row in rows], runner.device)
        self._inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        self._subject = torch.tensor([row.subject for row in rows], device=ids.device)
        self._resume: tuple[int, Tensor | None] = (0, None)

    @torch.no_grad()
    def read(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys K (d_in, n) at `site`, averaged over contexts, and the value site's current states (d, n), float64.

        Edits attached to the model in the meantime count. Sites are read in the order of their layers.
        """
        start, hidden = self._resume
        last, rows = self.sites[-1], len(self._subject)
        keys: list[Tensor] = []
        states: list[Tensor] = []
        entering: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(watching_input(self.runner.arch.layers[site.layer], entering.append))
            stack.enter_context(watching(site.module, rows, lambda seen, _: keys.append(self._at_subject(seen))))
            stack.enter_context(watching(last.module, rows, lambda _, output: states.append(self._at_subject(output))))
            out = self.runner.run(self._inputs, start=start, hidden=hidden, stop=last.layer + 1).hidden
        assert out is not None
        self._resume = (site.layer, entering[0])
        state = states[0] if self.value_at == "module_out" else self._at_subject(out)
        return self._per_fact(keys[0]).mean(1).T, self._per_fact(state)[:, 0].T

    def _at_subject(self, hidden: Tensor) -> Tensor:
        return hidden[torch.arange(len(self._subject), device=hidden.device), self._subject]  # (rows, d)

    def _per_fact(self, rows: Tensor) -> Tensor:
        return rows.double().view(-1, self.contexts, rows.shape[-1])  # (n, contexts, d)
