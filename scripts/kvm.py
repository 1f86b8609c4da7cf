"""Run tests or benchmarks under KVM, in an outer machine: ``scripts/test --kvm``, ``scripts/bench --kvm``.

What they write is shown as it comes, and the exit status is theirs. The report in JUnit's format, or the
results, and the log of the kernel stay behind in a directory that the last line names.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import outer
from tests import patience

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 10
"""By how much deadlines are longer in an emulated host."""

TEST_DEADLINE_S = 120 * PATIENCE
SHORT = ("tests/e2e/test_kvm.py",)
SHORT_DEADLINE_S = 1200.0
ALL = (
    *SHORT,
    "tests/e2e/test_vfio.py",
    "tests/integration/hypervisor/test_accelerator_probe.py",
    "tests/integration/hypervisor/test_vm_boot.py",
    "tests/integration/hypervisor/test_vm_death.py",
    "tests/integration/hypervisor/test_hotplug.py",
    "tests/integration/hypervisor/test_sizing.py",
    "tests/integration/hypervisor/test_huge_pages.py",
    "tests/integration/hypervisor/test_template.py",
    "tests/e2e/test_sizing.py",
    "tests/e2e/test_templates.py",
)
ALL_DEADLINE_S = 6 * 3600.0
BENCHMARKS = ("clone_over_cold", "run_template_over_cold", "shim_pss_mib", "pod_pss_mib")


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says.

    :param arguments: ``test`` or ``bench``, then what it is given.
    :returns: its exit status.
    """
    what, *given = arguments
    if what == "bench":
        return _run(_benchmarks(given), deadline_s=ALL_DEADLINE_S)
    short = given[:1] == ["--short"]
    command = _tests(given[1:], SHORT) if short else _tests(given, ALL)
    return _run(command, deadline_s=SHORT_DEADLINE_S if short else ALL_DEADLINE_S)


def _tests(given: list[str], listed: Sequence[str]) -> list[str]:
    """Build pytest's command line: for the tests that are named, or for those that are listed here."""
    named = any(argument.startswith("tests/") for argument in given)
    return [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={TEST_DEADLINE_S}"),
        *(f"--junitxml={outer.RESULTS}/report.xml", "-v", "--color=no", "--durations=0", "--durations-min=5"),
        *given,
        *(() if named else listed),
    ]


def _benchmarks(given: list[str]) -> list[str]:
    names = given or [*BENCHMARKS, "--rounds", "3"]
    return [sys.executable, "-m", "scripts.benchmarks", *names, "--json", f"{outer.RESULTS}/results.json"]


def _run(command: Sequence[str], *, deadline_s: float) -> int:
    environment = {
        patience.VARIABLE: f"{PATIENCE}",
        "HAKO_TEST_ACCELERATOR": "kvm",
        "HAKO_TEST_VFIO_DISK": outer.DISK,
        "HAKO_TEST_VFIO_CARDS": " ".join(outer.CARDS),
        "PYTHONUNBUFFERED": "1",
    }
    results = Path(tempfile.mkdtemp(prefix="hako-kvm-"))
    began_s = time.monotonic()
    status = outer.run(command, environment=environment, results=results, deadline_s=deadline_s)
    took_s = time.monotonic() - began_s
    print(f"kvm: exit status {status} after {took_s:.0f} s; what it left is in {results}", flush=True)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # so that nothing stays behind
    sys.exit(main(sys.argv[1:]))
