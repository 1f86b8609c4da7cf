"""Points in time in containerd's format."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

GO_ZERO_TIME_S = -62_135_596_800  # year 1: a Go program's zero time, "never"


def to_timestamp(seconds: float | None) -> Timestamp:
    """Convert seconds since 1970; ``None`` (it has not happened) becomes Go's zero time."""
    if seconds is None:
        return Timestamp(seconds=GO_ZERO_TIME_S)
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1_000_000_000))
    return stamp
