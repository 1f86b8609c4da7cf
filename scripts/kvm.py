"""Run tests under KVM, in an outer machine: ``scripts/test --kvm [--short] [pytest arguments]``.

What they write is shown as it comes, and the exit status is pytest's. The report in JUnit's format and the
log of the kernel stay behind in a directory that the last line names.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from scripts import outer
from tests import patience

PATIENCE = 10
"""By how much deadlines are longer in an emulated host."""

TEST_DEADLINE_S = 120 * PATIENCE
SHORT = ("tests/e2e/test_kvm.py",)
SHORT_DEADLINE_S = 1200.0
ALL = (
    *SHORT,
    "tests/integration/hypervisor/test_accelerator_probe.py",
    "tests/integration/hypervisor/test_vm_boot.py",
    "tests/integration/hypervisor/test_vm_death.py",
    "tests/integration/hypervisor/test_hotplug.py",
    "tests/integration/hypervisor/test_sizing.py",
    "tests/integration/hypervisor/test_template.py",
    "tests/e2e/test_sizing.py",
    "tests/e2e/test_templates.py",
)
ALL_DEADLINE_S = 6 * 3600.0


def main(arguments: list[str]) -> int:
    """Run the tests.

    :param arguments: ``--short`` for the part that is run for each change, then pytest's. Tests that are
        named there are run instead of those that are listed here.
    :returns: pytest's exit status.
    """
    short = arguments[:1] == ["--short"]
    given = arguments[1:] if short else arguments
    named = [argument for argument in given if argument.startswith("tests/")]
    chosen = [] if named else SHORT if short else ALL
    report = f"--junitxml={outer.RESULTS}/report.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={TEST_DEADLINE_S}", report),
        *("-v", "--color=no", "--durations=0", "--durations-min=5"),
        *given,
        *chosen,
    ]
    environment = {patience.VARIABLE: f"{PATIENCE}", "HAKO_TEST_ACCELERATOR": "kvm", "PYTHONUNBUFFERED": "1"}
    results = Path(tempfile.mkdtemp(prefix="hako-kvm-"))
    began_s = time.monotonic()
    deadline_s = SHORT_DEADLINE_S if short else ALL_DEADLINE_S
    status = outer.run(command, environment=environment, results=results, deadline_s=deadline_s)
    took_s = time.monotonic() - began_s
    print(
        f"kvm: exit status {status} after {took_s:.0f} s; report.xml and dmesg are in {results}", flush=True
    )
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # so that nothing stays behind
    sys.exit(main(sys.argv[1:]))
