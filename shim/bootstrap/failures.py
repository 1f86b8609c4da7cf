"""Counts the failures that no shim can count: a ``start`` without a shim, and a shim that died."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from shim import config
from shim.config import ConfigText
from shim.host import state_directory
from shim.refusal import Refusal
from shim.telemetry import journal, log, postmortem

PHASE = "shim"
"""The phase in the journal."""

_LINES = 20
_TAIL_BYTES = 1 << 14


def start_failed(cause: str) -> None:
    """Count a ``start`` in the node's journal, if that is possible.

    :param cause: the kind of its error.
    """
    try:
        log_dir = config.parse(config.locate(os.environ)).shim.log_dir
    except (Refusal, OSError):  # which may be why it failed
        log_dir = config.ShimConfig().log_dir
    _count(log_dir, cause)


def died(directory: str) -> None:
    """Count a shim that died, and keep the last lines of it and of its guest for ``hako logs``.

    :param directory: the state directory of its sandbox.
    """
    with contextlib.suppress(Refusal, OSError, ValueError, TypeError):  # the sandbox is removed in any case
        record = state_directory.read_record(directory)
        found = ConfigText(text=record.config_text, source=record.config_source)
        log_dir = config.parse(found).shim.log_dir
        _count(log_dir, "Died")
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = [f"{when} its shim died; the kernel's log says whether memory was short"]
        for kind, path in log.files(Path(directory)).items():
            lines += [f"{kind}: {line}" for line in _tail(path)]
        path = postmortem.path_of(Path(log_dir), namespace=record.namespace, sandbox_id=record.id)
        postmortem.keep(path, "".join(f"{line}\n" for line in lines))


def _count(log_dir: str, cause: str) -> None:
    # Standard error is for the answer to containerd.
    logging.getLogger(journal.__name__).addHandler(logging.NullHandler())
    journal.Journal(Path(log_dir)).note("failure", {"phase": PHASE, "cause": cause})


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-_LINES:]
    except FileNotFoundError:
        return []
