"""How long a shim's calls take, counted in buckets, and how much data it had to drop.

Counting costs a microsecond. Nothing is computed before a monitor asks. The numbers are those of this
process, which serves one sandbox.
"""

from __future__ import annotations

from bisect import bisect_left

#: Upper limits of the buckets, in milliseconds, as in Kata's histograms; the last bucket has none.
BOUNDS_MS = tuple(float(1 << power) for power in range(10))
MOST_NAMES = 100
OTHERS = "others"


class Histogram:
    """Counts how long something took."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_MS) + 1)
        self.sum_ms = 0.0

    def observe(self, took_s: float) -> None:
        """Count one more."""
        took_ms = took_s * 1000
        self.buckets[bisect_left(BOUNDS_MS, took_ms)] += 1
        self.sum_ms += took_ms


class Latencies:
    """Histograms by the name of the call; names beyond the hundredth share one."""

    def __init__(self) -> None:
        self.by_name: dict[str, Histogram] = {}

    def observe(self, name: str, took_s: float) -> None:
        """Count a call.

        :param name: the name of the call.
        :param took_s: how long it took, in seconds.
        """
        histogram = self.by_name.get(name)
        if histogram is None:
            known = len(self.by_name) < MOST_NAMES
            histogram = self.by_name.setdefault(name if known else OTHERS, Histogram())
        histogram.observe(took_s)


#: Calls from containerd to the shim.
SHIM = Latencies()
#: Calls from the shim to the guest's agent.
AGENT = Latencies()
#: Commands from the shim to QEMU.
QMP = Latencies()
#: Data that was dropped because there was too much of it, by kind.
dropped: dict[str, int] = {}


def drop(kind: str, count: int = 1) -> None:
    """Count dropped data.

    :param kind: the kind of data.
    :param count: how many.
    """
    dropped[kind] = dropped.get(kind, 0) + count
