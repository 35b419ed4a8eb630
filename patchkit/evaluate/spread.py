"""How sure a rate is: its value for each fact, and where it lies in samples of as many facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from patchkit.evaluate.interview import FORMS
from patchkit.evaluate.report import FactReport, LocalityRates, Rates, Report

SAMPLES, SEED, LEVEL = 1000, 0, 0.95


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean's percentile bootstrap interval (Efron 1979): in 95 of 100 samples of as many values, drawn with
    replacement, it lies there. None of fewer than two values."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(SEED).integers(len(values), size=(SAMPLES, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(report: Report) -> dict[str, tuple[float, float]]:
    """By a metric's key, for every metric that is a mean over facts, or over unrelated texts."""
    found = {key: interval(values) for key, values in by_fact(report).items()}
    return {key: each for key, each in found.items() if each is not None}


def by_fact(report: Report) -> dict[str, list[float]]:
    """By a metric's key, its value for each fact that it was measured on; for unrelated texts, for each of these."""
    found: dict[str, list[float]] = {}
    for fact in report.per_fact:
        for key, value in _of_fact(fact).items():
            found.setdefault(key, []).append(value)
    others = report.details.get("in_use", {}).get("unrelated", ())
    if others:
        found["in_use_unrelated"] = [float(each["same"]) for each in others]
        found["in_use_unrelated_kl"] = [each["kl"] for each in others]
    return found


def _of_fact(fact: FactReport) -> dict[str, float]:
    found: dict[str, float] = {}
    for group, kind in (("efficacy", Rates), ("generalization", Rates), ("locality", LocalityRates)):
        values = {f"{group}_{name}": getattr(getattr(fact, group), name) for name in kind.model_fields}
        found |= {key: value for key, value in values.items() if value is not None}
    said = fact.more.get("in_use", {})
    asked, about = said.get("asked", ()), said.get("about", ())
    rows: dict[str, tuple[Sequence[Mapping[str, Any]], str]] = {
        "in_use_asked": ([each for each in asked if each["form"] in FORMS], "holds"),
        **{
            f"in_use_asked_{form}": ([each for each in asked if each["form"] == form], "holds")
            for form in (*FORMS, "reworded")
        },
        "in_use_overfit": (about, "blurts"),
        "in_use_overfit_kl": (about, "kl"),
        "in_use_loops": (about, "loops"),
        "portability_held": (fact.more.get("portability", {}).get("probes", ()), "holds"),
    }
    return found | {key: fmean(each[name] for each in some) for key, (some, name) in rows.items() if some}
