"""The page of `patchkit locate`."""

from __future__ import annotations

from pathlib import PurePath

from patchkit.report.charts import Heat, Lines, Series
from patchkit.report.page import Page
from patchkit.runs.locate import Located
from patchkit.words import agreeing, counted


def locations_page(found: Located) -> Page:
    """Curves over layers, and each fact's share by layer."""

    def line(name: str, field: str) -> Series:
        values = [(float(each.layer), getattr(each, field)) for each in found.layers]
        return Series(name, [(layer, value) for layer, value in values if value is not None])

    count = f"{found.counted} {agreeing(found.counted, 'count')}"
    shares = [line("feed-forward", "feed_forward"), line("whole layer", "states")]
    return Page(
        title=f"Where {PurePath(found.model).name} keeps what it says of {counted(found.counted, 'subject')}",
        lead=[f"Recommended layers: {found.recommended}. Of {counted(found.facts, 'fact')}, {count}."],
        headline=None,
        charts=[
            Lines("what comes back", "layer", shares, caption="Share of what noise on the subject took away."),
            Lines("activation", "layer", [line("‖k‖", "active")], caption="At the subject's last token."),
            Lines("the feed-forward's share of the stream", "layer", [line("share", "share")]),
            Lines("values tried at each layer", "layer", [line("target loss", "loss")], caption="Nats, in the end."),
            Lines("change needed", "layer", [line("needed", "needed")], caption="‖V - WK‖ / (‖W‖₂ ‖K‖)."),
            Heat("each fact, layer by layer", found.traces, "Darker: more comes back with the layer's feed-forward."),
        ],
        tables=[],
        reports={},
    )
