"""Alternating rounds of measurements, and their statistics."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples in the metric's unit.

    :param value: Hako's.
    :param baseline: the baseline's; empty if there is none.
    :param curves: the points of each curve, by its title with its unit.
    """

    value: tuple[float, ...]
    baseline: tuple[float, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    """The median of some samples, and the quartiles around it."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result of one metric.

    :param unit: the unit of ``value`` and ``baseline``.
    :param value: Hako's.
    :param baseline: the baseline's, if there is one.
    :param n: the number of samples behind ``value``.
    :param curves: as the samples have them.
    """

    unit: str
    value: Middle
    baseline: Middle | None
    n: int
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The median as a multiple of the baseline's; None without one."""
        if self.baseline is None or not self.baseline.median:
            return None
        return self.value.median / self.baseline.median


def alternate(rounds: int, *, value: Callable[[], float], baseline: Callable[[], float]) -> Samples:
    """Measure two subjects in turns, each first in every other round, so that drift favours neither.

    :param rounds: how often each is measured.
    :param value: measures Hako once.
    :param baseline: measures the baseline once.
    """
    values: list[float] = []
    baselines: list[float] = []
    turns = [(value, values), (baseline, baselines)]
    for _ in range(rounds):
        for measure, collected in turns:
            collected.append(measure())
        turns.reverse()
    return Samples(value=tuple(values), baseline=tuple(baselines))


def middle(samples: tuple[float, ...]) -> Middle:
    """Find the median and the quartiles of at least one sample."""
    if len(samples) == 1:
        return Middle(low=samples[0], median=samples[0], high=samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Middle(low=low, median=median, high=high)


def summarize(samples: Samples, *, unit: str) -> Summary:
    """Reduce samples to medians and spreads.

    :param samples: at least one value.
    :param unit: the unit of the samples.
    """
    return Summary(
        unit=unit,
        value=middle(samples.value),
        baseline=middle(samples.baseline) if samples.baseline else None,
        n=len(samples.value),
        curves=samples.curves,
    )


def document(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Convert the results to the form in which they are saved as JSON."""
    return {
        "metrics": {
            name: {
                "value": summary.value.median,
                "unit": summary.unit,
                "baseline": summary.baseline.median if summary.baseline else None,
                "ratio": summary.ratio,
                "n": summary.n,
                **({"curves": dict(summary.curves)} if summary.curves else {}),
            }
            for name, summary in summaries.items()
        }
    }


def line(name: str, summary: Summary) -> str:
    """Format one result for a terminal: medians, quartiles in brackets, ratio."""
    words = [f"{name:<20}", _phrase(summary.value), summary.unit]
    if summary.baseline is not None:
        words += ["against", _phrase(summary.baseline)]
    if summary.ratio is not None:
        words.append(f"ratio {summary.ratio:.2f}")
    return " ".join([*words, f"n {summary.n}"])


def _phrase(found: Middle) -> str:
    return f"{found.median:.4g} [{found.low:.4g} to {found.high:.4g}]"
