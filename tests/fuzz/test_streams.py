"""Any strings for the streams of a process are opened or refused, and the process can be deleted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hypothesis import example, given
from hypothesis import strategies as st

from proto.containerd import task_v3_pb2
from tests.fuzz.material import LONG, texts

if TYPE_CHECKING:
    from typing import Any


# Relative to the fixture's directory, so that hostile paths stay in it. No FIFO lacks a reader.
PATHS = [
    "",
    "DIR/file",
    "DIR",
    "DIR/no/such/file",
    "DIR/a\0b",
    f"DIR/{LONG}",
    "relative",
    "/dev/null",
    "DIR/ttrpc",
    "file://DIR/log",
    "file://DIR/new/log",
    "file://DIR/a%00b",
    "file://DIR",
    "file://DIR/%zz",
    f"file://DIR/{LONG}",
    "file://host/log",
    "file://[",
    "fifo://DIR/file",
    "fifo://DIR/a\0b",
    "binary:///bin/true?a=b",
    "binary:///no/such/driver",
    "binary:///bin/true?a=%00",
    "binary://[",
    "binary://relative",
    "binary:///DIR\0",
    "binary-v2:///bin/true",
    "http://x",
    "://",
]
paths = st.one_of(st.sampled_from(PATHS), texts.map(lambda text: f"DIR/{text}"))


@given(stdin=paths, stdout=paths, stderr=paths, terminal=st.booleans(), as_exec=st.booleans())
@example(stdin="DIR/a\0b", stdout="", stderr="", terminal=False, as_exec=False)
@example(stdin="", stdout="DIR/a\0b", stderr="", terminal=False, as_exec=False)
@example(stdin="", stdout="file://[", stderr="", terminal=False, as_exec=True)
@example(stdin="", stdout="binary://[", stderr="", terminal=False, as_exec=False)
@example(stdin="", stdout="binary:///bin/true?a=%00", stderr="", terminal=False, as_exec=False)
def test_any_stream_paths(
    shim: Any, *, stdin: Any, stdout: Any, stderr: Any, terminal: Any, as_exec: Any
) -> None:
    where = str(shim.directory / "streams")
    (shim.directory / "streams").mkdir(exist_ok=True)
    (shim.directory / "streams" / "file").touch()
    names = {
        "stdin": stdin.replace("DIR", where),
        "stdout": stdout.replace("DIR", where),
        "stderr": stderr.replace("DIR", where),
    }
    with shim.connect() as peer:
        if as_exec:
            shim.ensure_running()
            request = task_v3_pb2.ExecProcessRequest(id="box", exec_id="streams", terminal=terminal, **names)
            request.spec.value = json.dumps({"args": ["true"], "cwd": "/"}).encode()
            if peer.ask("Exec", request) == 0:
                started = peer.ask("Start", task_v3_pb2.StartRequest(id="box", exec_id="streams")) == 0
                peer.ask("Kill", task_v3_pb2.KillRequest(id="box", exec_id="streams", signal=9))
                wait = task_v3_pb2.WaitRequest(id="box", exec_id="streams")
                assert not started or peer.ask("Wait", wait) == 0
                assert peer.ask("Delete", task_v3_pb2.DeleteRequest(id="box", exec_id="streams")) == 0
        else:
            create = task_v3_pb2.CreateTaskRequest(
                id="streams", bundle=str(shim.bundle), terminal=terminal, **names
            )
            if peer.ask("Create", create) == 0:
                assert peer.ask("Start", task_v3_pb2.StartRequest(id="streams")) == 0
                shim.remove("streams")
    shim.assert_serves()


BUNDLES = ["", ".", "relative", "/", "/no/such", "/a\0b", f"/{LONG}", "/dev/null", "/proc/self/mem"]


@given(bundle=st.one_of(st.sampled_from(BUNDLES), texts.map(lambda text: f"/no/{text}")))
@example(bundle="")
@example(bundle="/a\0b")
@example(bundle=f"/{LONG}")
def test_a_directory_that_is_not_a_bundle_is_refused(shim: Any, bundle: Any) -> None:
    with shim.connect() as peer:
        assert peer.ask("Create", task_v3_pb2.CreateTaskRequest(id="bundled", bundle=bundle)) == 3
    shim.assert_serves()
