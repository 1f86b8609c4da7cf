"""The kernel's counters of the whole guest in Prometheus' text format, under Kata's names."""

from __future__ import annotations

import os

from guest.agent import files

_CPU = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
_LOADS = ("load1", "load5", "load15")
_TICKS_PER_S = 100  # USER_HZ, the same on every x86 kernel
_KIB = 1024


def report() -> str:
    """Return the numbers."""
    lines: list[str] = []

    def add(name: str, label: str, item: str, value: float) -> None:
        lines.append(f'kata_guest_{name}{{{label}="{item}"}} {value}')

    for line in files.read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split()
        item = name.lower().replace("(", "_").replace(")", "")
        add("meminfo", "item", item, int(number) * (_KIB if unit else 1))
    first, *_ = files.read("/proc/stat").splitlines()
    for item, ticks in zip(_CPU, first.split()[1:], strict=False):
        add("cpu_time", "item", item, int(ticks) / _TICKS_PER_S)
    *loads, tasks, _ = files.read("/proc/loadavg").split()
    for item, load in zip(_LOADS, loads, strict=True):
        add("load", "item", item, float(load))
    current, _, most = tasks.partition("/")
    add("tasks", "item", "cur", int(current))
    add("tasks", "item", "max", int(most))
    lines.append(f"kata_agent_threads {len(os.listdir('/proc/self/task'))}")
    return "".join(f"{line}\n" for line in lines)
