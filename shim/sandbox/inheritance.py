"""The attributes that a container's processes inherit from this process, as from any runtime.

The first process of a machine has the kernel's own values instead, so the guest gets this process's values.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.agent.client import Agent

_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_MOST_FILES = 1 << 20  # the default of fs.nr_open
_UNLIMITED = resource.RLIM_INFINITY
_WITHOUT = (_UNLIMITED, _UNLIMITED)
# In the order of the kernel's numbers (include/uapi/asm-generic/resource.h).
_TYPES = (
    *("CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE"),
    *("MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"),
)
# The value in the first process of a machine of any size; every process of the guest inherits it by default.
_KERNELS = {
    **dict.fromkeys(("CPU", "FSIZE", "DATA", "RSS", "AS", "LOCKS", "RTTIME"), _WITHOUT),
    "STACK": (8 << 20, _UNLIMITED),
    "CORE": (0, _UNLIMITED),
    "MSGQUEUE": (819_200, 819_200),
    "NICE": (0, 0),
    "RTPRIO": (0, 0),
}


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The attributes of a process unless its specification says otherwise.

    :param rlimits: soft and hard limit by type, without those that the guest's kernel sets anyway.
    :param oom_score_adj: how readily the kernel kills it for memory.
    """

    rlimits: dict[str, tuple[int, int]]
    oom_score_adj: int


def handed_down(agent: Agent) -> Inheritance:
    """Read the attributes of this process that a guest's processes inherit.

    :param agent: the guest's agent; only Hako's raises limits of the guest's kernel beforehand.
    :raises OSError: if ``/proc`` is not mounted.
    """
    found = {name: resource.getrlimit(number) for number, name in enumerate(_TYPES)}
    rlimits = {
        f"RLIMIT_{name}": (_as_in_json(soft), _as_in_json(hard))
        for name, (soft, hard) in found.items()
        if (soft, hard) != _KERNELS.get(name)
    }
    if not agent.is_hako and "RLIMIT_NOFILE" in rlimits:
        soft, hard = rlimits["RLIMIT_NOFILE"]
        rlimits["RLIMIT_NOFILE"] = min(soft, _MOST_FILES), min(hard, _MOST_FILES)
    return Inheritance(rlimits, oom_score_adj=int(_OOM_SCORE_ADJ.read_text(encoding="ascii")))


def _as_in_json(limit: int) -> int:
    return (1 << 64) - 1 if limit == _UNLIMITED else limit
