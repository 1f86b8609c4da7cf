"""The particulars of a sandbox's shim, made by the daemon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.config import Config
    from shim.host.ledger import Ledger
    from shim.host.state_directory import StartRecord
    from shim.sandbox.work import Work
    from shim.telemetry.events import Publisher
    from shim.telemetry.trace_export import TraceExport


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The particulars of one shim, and the objects that its sandbox uses.

    :param record: how the shim was started.
    :param config: the operator's configuration.
    :param ledger: where everything that must be undone is recorded.
    :param publisher: sends events to containerd.
    :param work: runs the sandbox's tasks.
    :param leave: ends the shim.
    :param host_mounts: the mount namespace that containerd started the shim in, open; None is this process's
        own.
    :param traces: where traces of starts go; None if nowhere.
    """

    record: StartRecord
    config: Config
    ledger: Ledger
    publisher: Publisher
    work: Work
    leave: Callable[[], None]
    host_mounts: int | None = None
    traces: TraceExport | None = None

    @property
    def directory(self) -> Path:
        """The sandbox's state directory."""
        return Path(self.record.state_directory)
