"""Rounds, medians and the form of the results of ``scripts/bench``."""

from __future__ import annotations

import json

import pytest

from scripts.benchmarks.harness import Middle, Samples, alternate, document, line, middle, summarize


def test_two_subjects_take_turns_in_being_measured_first() -> None:
    order = []

    def measure(name: str, result: float) -> float:
        order.append(name)
        return result

    samples = alternate(3, value=lambda: measure("value", 1.0), baseline=lambda: measure("baseline", 2.0))

    assert order == ["value", "baseline", "baseline", "value", "value", "baseline"]
    assert samples == Samples(value=(1.0, 1.0, 1.0), baseline=(2.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        pytest.param((4.0,), Middle(low=4.0, median=4.0, high=4.0), id="one"),
        pytest.param((3.0, 1.0), Middle(low=1.5, median=2.0, high=2.5), id="two"),
        pytest.param((1.0, 2.0, 3.0, 4.0, 1000.0), Middle(low=2.0, median=3.0, high=4.0), id="an-outlier"),
    ],
)
def test_the_spread_is_the_spread_of_the_middle_half(samples: tuple[float, ...], found: Middle) -> None:
    assert middle(samples) == found


def test_a_ratio_is_the_ratio_of_the_medians() -> None:
    summary = summarize(Samples(value=(1.0, 3.0, 2.0), baseline=(8.0, 4.0, 4.0)), unit="s")

    assert summary.ratio == 0.5


@pytest.mark.parametrize("baseline", [(), (0.0,)], ids=["no-baseline", "nothing"])
def test_a_missing_baseline_gives_no_ratio(baseline: tuple[float, ...]) -> None:
    assert summarize(Samples(value=(1.0,), baseline=baseline), unit="s").ratio is None


def test_the_document_has_the_medians_by_name() -> None:
    summaries = {
        "with": summarize(Samples(value=(1.0, 2.0, 3.0), baseline=(4.0,)), unit="ms"),
        "without": summarize(Samples(value=(7.0,)), unit="%"),
    }

    assert json.loads(json.dumps(document(summaries))) == {
        "metrics": {
            "with": {"value": 2.0, "unit": "ms", "baseline": 4.0, "ratio": 0.5, "n": 3},
            "without": {"value": 7.0, "unit": "%", "baseline": None, "ratio": None, "n": 1},
        }
    }


def test_curves_are_kept_as_they_were_measured() -> None:
    curves = {"start (s)": ((1.0, 0.5), (10.0, 0.6))}
    summaries = {"growth": summarize(Samples(value=(0.6,), baseline=(0.5,), curves=curves), unit="s")}

    kept = json.loads(json.dumps(document(summaries)))["metrics"]["growth"]

    assert kept["curves"] == {"start (s)": [[1.0, 0.5], [10.0, 0.6]]}


def test_a_line_shows_the_median_and_its_spread() -> None:
    summary = summarize(Samples(value=(1.0, 2.0, 3.0), baseline=(4.0,)), unit="ms")

    assert line("name", summary).split() == (
        ["name", "2", "[1.5", "to", "2.5]", "ms", "against", "4", "[4", "to", "4]", "ratio", "0.50", "n", "3"]
    )
