"""How readily the host's kernel kills a process when memory runs out."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def set_oom_score_adj(pid: int, value: int) -> None:
    """Set the score; a process that is gone is ignored, and a refusal of the host is logged.

    :param pid: the process.
    :param value: from -1000 (never) to 1000 (first of all); see ``/proc/PID/oom_score_adj`` in proc(5).
    """
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text(f"{value}", encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return
    except OSError as error:
        log.warning("process %d: its oom_score_adj is not %d: %s", pid, value, error.strerror)
