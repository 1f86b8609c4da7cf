"""Measure how many lines and branches the unit tests run, and hold pure modules to a floor.

``python -m scripts.coverage`` reports everything that the unit tests reach (minutes). With ``--pure``, it
reports only the groups that have a floor, each by its own tests (seconds). The exit status is 1 if a group
is below its floor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

TOP = Path(__file__).resolve().parents[1]
PACKAGES = ("shim", "hypervisor", "guest")
FLOOR = 95.0


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of pure functions or tables, and the unit tests that must cover them by themselves.

    :param modules: patterns of paths below the top of the tree.
    :param tests: arguments for pytest.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]


GROUPS = {
    "ttrpc codec": Group(
        ("shim/transport/ttrpc_codec.py",), ("tests/unit/shim/transport/test_ttrpc_codec.py",)
    ),
    "framing": Group(("shim/agent/frames.py",), ("tests/unit/shim/agent/test_frames.py",)),
    "bootstrap wire": Group(("shim/bootstrap/wire.py",), ("tests/unit/shim/bootstrap/test_wire.py",)),
    "OCI translation": Group(("shim/agent/oci*.py",), ("tests/unit/shim/agent",)),
    "argv": Group(
        ("hypervisor/argv.py", "hypervisor/x86_64.py", "hypervisor/architecture.py"),
        (
            "tests/unit/hypervisor/test_qemu_argv.py",
            "tests/unit/hypervisor/test_vfio.py",
            "tests/unit/hypervisor/test_architecture.py",
        ),
    ),
    "state tables": Group(
        ("shim/sandbox/process.py", "shim/sandbox/life.py", "shim/machine/rest.py"),
        (
            "tests/unit/shim/sandbox/test_process.py",
            "tests/unit/shim/sandbox/test_life.py",
            "tests/unit/shim/machine/test_rest.py",
        ),
    ),
    "sizing": Group(
        ("shim/machine/sizing.py", "shim/machine/resizing.py", "shim/machine/limits.py"),
        ("tests/unit/shim/machine/test_sizing.py", "tests/unit/shim/machine/test_resizing.py"),
    ),
    "network plan": Group(
        (
            "shim/network/plan.py",
            "shim/network/decode.py",
            "shim/network/messages.py",
            "shim/network/rules.py",
        ),
        ("tests/unit/shim/network",),
    ),
}


def measure(tests: list[str]) -> dict[str, Any]:
    """Run unit tests, and return coverage's report.

    :raises subprocess.CalledProcessError: if a test fails.
    """
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.json")
        argv = [
            *(sys.executable, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider", *tests),
            *(f"--cov={package}" for package in PACKAGES),
            *("--cov-branch", f"--cov-report=json:{report}", "--cov-report="),
        ]
        environment = {**os.environ, "COVERAGE_FILE": str(Path(place, "data"))}
        subprocess.run(argv, cwd=TOP, env=environment, check=True)
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def share(summaries: list[Mapping[str, int]]) -> float:
    """Return the share of lines and branches that was run, in per cent."""
    run = sum(one["covered_lines"] + one["covered_branches"] for one in summaries)
    there = sum(one["num_statements"] + one["num_branches"] for one in summaries)
    return 100.0 * run / there if there else 0.0


def of_group(group: Group, files: Mapping[str, Any]) -> float:
    """Return the share of a group that was run, in per cent.

    :raises LookupError: if one of its modules does not exist or was not measured.
    """
    summaries = []
    for pattern in group.modules:
        found = [files[path]["summary"] for path in files if fnmatch(path, pattern)]
        if not found:
            raise LookupError(
                f"coverage: {pattern}: no such module was measured; correct scripts/coverage.py"
            )
        summaries += found
    return share(summaries)


def main() -> int:
    """Measure, print a line for each group, and tell whether one is below the floor."""
    parser = argparse.ArgumentParser(prog="coverage", description=__doc__)
    parser.add_argument("--pure", action="store_true", help="only the groups that have a floor")
    tests = {test for group in GROUPS.values() for test in group.tests}
    files = measure(sorted(tests) if parser.parse_args().pure else ["tests/unit"])["files"]
    shares = {name: of_group(group, files) for name, group in GROUPS.items()}
    for name, reached in shares.items():
        verdict = "" if reached >= FLOOR else f": below {FLOOR:g} %; add unit tests"
        print(f"{reached:6.1f} %  {name}{verdict}")
    for package in PACKAGES:
        summaries = [file["summary"] for path, file in files.items() if path.startswith(f"{package}/")]
        print(f"{share(summaries):6.1f} %  all of {package}, by the tests that were run")
    return int(min(shares.values()) < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
