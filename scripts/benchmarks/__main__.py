"""The command: measure, print and save results, and draw charts."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path

from scripts.benchmarks.catalog import METRICS
from scripts.benchmarks.harness import Summary, document, line, summarize
from scripts.benchmarks.stage import Stage, opened

ROUNDS = 5


def main() -> int:
    """Run the metrics that the command line names.

    :returns: 0 if everything could be measured, else 1.
    """
    options = _parser().parse_args()
    names = list(dict.fromkeys(options.names)) or list(METRICS)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        _parser().error(f"{', '.join(unknown)}: no such metric; there are {', '.join(METRICS)}")
    with opened(rounds=options.rounds) as stage:
        summaries = _measure(stage, names)
    if options.json:
        options.json.write_text(json.dumps(document(summaries), indent=2) + "\n", encoding="utf-8")
    if options.plot:
        from scripts.benchmarks import charts  # noqa: PLC0415 - its libraries are installed only for --plot

        charts.draw(summaries, options.plot)
    return 0 if len(summaries) == len(names) else 1


def _measure(stage: Stage, names: list[str]) -> dict[str, Summary]:
    """Measure one metric after another; report and leave out those that fail."""
    summaries = {}
    for name in names:
        try:
            samples = METRICS[name].measure(stage)
        except Exception as error:  # noqa: BLE001 - if one fails, the others are still measured
            print(f"bench: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            _clear_away(stage)
            continue
        summaries[name] = summarize(samples, unit=METRICS[name].unit)
        print(line(name, summaries[name]), flush=True)
    return summaries


def _clear_away(stage: Stage) -> None:
    try:
        stage.kill_everything()
    except TimeoutError as error:
        print(f"bench: later metrics are disturbed: {error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    descriptions = "\n\n".join(
        f"{name} ({metric.unit}): {inspect.getdoc(metric.measure)}" for name, metric in METRICS.items()
    )
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure Hako and its baselines in turns on this machine.",
        epilog=f"metrics:\n\n{descriptions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a metric; default: all")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, help="how often each metric is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="where to write charts")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
