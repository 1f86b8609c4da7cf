"""A file system of the host that hangs costs a request its deadline, and others nothing."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from tests.e2e.by_hand import PROCESS, ByHand
from tests.e2e.hung import hung_at
from tests.e2e.test_floods import assert_in_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

NAMESPACES = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
#: By what hangs: what more is in the specification, and what more in the request.
NAMED: dict[str, Callable[[str], tuple[dict[str, Any], dict[str, Any]]]] = {
    "volume": lambda path: (
        {"mounts": [{"destination": "/v", "type": "bind", "source": path, "options": ["rbind"]}]},
        {},
    ),
    "root": lambda path: ({"root": {"path": path}}, {}),
    "namespace": lambda path: ({"linux": {"namespaces": [{"type": "network", "path": path}]}}, {}),
    "hook": lambda path: ({"hooks": {"poststop": [{"path": path}]}}, {}),
    "root file system": lambda path: ({}, {"rootfs": [{"type": "ext4", "source": path}]}),
    "bundle": lambda path: ({}, {"bundle": str(Path(path).parent)}),
    "output": lambda path: ({}, {"stdout": path}),
    "log file": lambda path: ({}, {"stdout": f"file://{path}"}),
    "log driver": lambda path: ({}, {"stdout": f"binary://{path}"}),
}


def test_each_path_of_a_request_may_hang_and_the_shim_serves_on(one_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "hung").mkdir()
    (tmp_path / "box").mkdir()
    with hung_at(tmp_path / "hung") as path, ByHand(one_stack, tmp_path / "box") as box:

        def create(kind: str) -> str:
            more, fields = NAMED[kind](str(path))
            bundle = tmp_path / kind
            (bundle / "rootfs").mkdir(parents=True)
            spec = {
                "ociVersion": "1.0.2",
                "process": {"args": ["true"], **PROCESS},
                "root": {"path": "rootfs"},
                "linux": {"namespaces": NAMESPACES},
                **more,
            }
            (bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
            try:
                box.call("Create", **{"id": kind.replace(" ", "-"), "bundle": str(bundle), **fields})
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"
            return "created"

        with ThreadPoolExecutor(len(NAMED)) as pool:
            asked = {kind: pool.submit(create, kind) for kind in NAMED}
            took_s = []
            while not all(answer.done() for answer in asked.values()):
                began_s = time.monotonic()
                box.call("State")
                took_s.append(time.monotonic() - began_s)
                with contextlib.suppress(TimeoutError):
                    next(iter(asked.values())).exception(timeout=0.1)
        assert_in_time(took_s)
        answers = {kind: answer.result() for kind, answer in asked.items()}
        assert box.output("echo", "still here") == "still here\n"

    for kind, answer in answers.items():
        assert answer.startswith("DEADLINE_EXCEEDED: "), (kind, answer)
        assert f"{path.parent}" in answer
        assert "its file system has not answered for 10 s" in answer
