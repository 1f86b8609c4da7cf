"""The real bootstrap with a daemon that only keeps its sockets open and reports what it was given."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import shim
from shim import config, entry
from shim.host import state_directory

if TYPE_CHECKING:
    from typing import Any


def run(record: Any, listener_descriptor: Any, ready: Any) -> None:
    if os.environ.get("STUB_DIES"):
        # Like the real daemon at its end: it must not wait for a start that waits for it.
        assert state_directory.lock_existing(record.state_directory, wait=False) is None
        sys.exit(os.environ["STUB_DIES"])
    if listener_descriptor is None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(record.socket_path)
        listener.listen()
    else:
        listener = socket.socket(fileno=listener_descriptor)
    descriptors = {
        link.name: str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    }
    seen = {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "descriptors": descriptors,
        "environment": dict(os.environ),
        "command": Path("/proc/self/comm").read_text().strip(),
        "arguments": Path("/proc/self/cmdline").read_text().split("\0")[:-1],
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
    }
    ready()
    target = Path(record.state_directory) / "seen.json"
    target.with_suffix(".new").write_text(json.dumps(seen))
    target.with_suffix(".new").rename(target)
    os.write(2, b"the daemon runs\n")
    signal.sigwait({signal.SIGTERM} if not os.environ.get("STUB_HANGS") else {signal.SIGUSR1})


if os.environ.get("STUB_HANGS"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
if accepted_within_s := os.environ.get("STUB_ACCEPTED_WITHIN_S"):
    # A start does without a zygote that takes a second to accept it, as one on a busy host may.
    entry._ACCEPT_TIMEOUT_S = float(accepted_within_s)
    if "-zygote" in sys.argv:
        from shim.bootstrap import zygote

        zygote._REQUEST_TIMEOUT_S = float(accepted_within_s)
# Failed starts are not counted on the host that runs the test.
config.ShimConfig.log_dir = os.environ["STUB_LOG_DIR"]

stub = types.ModuleType("shim.daemon")
vars(stub)["run"] = run
sys.modules["shim.daemon"] = stub
vars(shim)["daemon"] = stub
sys.exit(entry.main())
