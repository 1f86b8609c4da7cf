"""Charts of results, each as PNG and as SVG: bars, or curves over a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from scripts.benchmarks.catalog import METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scripts.benchmarks.harness import Middle, Summary

_OURS = "#2f6f9f"
_THEIRS = "#b9c4cc"


def draw(summaries: Mapping[str, Summary], directory: Path) -> None:
    """Draw a chart for each metric, and one with all ratios.

    :param summaries: the results.
    :param directory: where the files go; it is created if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The same results give the same bytes.
    mpl.rcParams["svg.hashsalt"] = "hako"
    for name, summary in summaries.items():
        _save(_curves(name, summary) if summary.curves else _metric(name, summary), directory, name)
    ratios = {
        name: summary.ratio
        for name, summary in summaries.items()
        if summary.ratio is not None and not summary.curves
    }
    if ratios:
        _save(_ratios(ratios), directory, "ratios")


def _metric(name: str, summary: Summary) -> Figure:
    bars = [("Hako", summary.value, _OURS)]
    if summary.baseline is not None:
        bars.append((METRICS[name].against, summary.baseline, _THEIRS))
    figure = Figure(figsize=(6, 0.9 + 0.45 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for label, found, color in reversed(bars):
        axes.barh(label, found.median, xerr=_whiskers(found), color=color, capsize=3)
    axes.set_xlabel(summary.unit)
    axes.set_title(name, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(name: str, summary: Summary) -> Figure:
    figure = Figure(figsize=(3.2 * len(summary.curves), 2.8), layout="constrained")
    figure.suptitle(name)
    for place, (what, points) in enumerate(summary.curves.items(), start=1):
        axes = figure.add_subplot(1, len(summary.curves), place)
        axes.plot(*zip(*points, strict=True), marker="o", color=_OURS)
        axes.set_title(what, loc="left", fontsize="medium")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ratios(ratios: Mapping[str, float]) -> Figure:
    figure = Figure(figsize=(6, 0.9 + 0.35 * len(ratios)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(ratios), list(ratios.values()), color=_OURS)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("Hako / baseline")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _whiskers(found: Middle) -> list[list[float]]:
    return [[found.median - found.low], [found.high - found.median]]


def _save(figure: Figure, directory: Path, name: str) -> None:
    figure.savefig(directory / f"{name}.png", dpi=150)
    figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
