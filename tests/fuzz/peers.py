"""Clients that send any bytes to a served shim, and the rules that every answer follows."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from proto import ttrpc_pb2
from proto.containerd import task_v3_pb2
from shim.transport.ttrpc_codec import Frame, FrameDecoder, OversizedFrame, encode_request
from tests.patience import patient

if TYPE_CHECKING:
    from typing import Any, Self


TASK = "containerd.task.v3.Task"
ANSWER_TIMEOUT_S = patient(60.0)
MIB = 1 << 20

CONTRACT_CODES = frozenset({0, 3, 4, 5, 6, 8, 9, 12, 14})
"""The status codes for a client's own mistake: neither Unknown nor Internal."""

_ROOT = Path(__file__).parents[2]
_DEFECTS = ("unexpected failure", "Traceback", "was never retrieved", "Exception in callback")


def assert_contract(code: int, message: str) -> None:
    assert code in CONTRACT_CODES, f"{code}: {message}"
    assert message.isprintable(), repr(message)
    assert len(message.encode()) <= 2048


class TtrpcPeer:
    """A connection that can send anything."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(ANSWER_TIMEOUT_S)
        self.socket.connect(str(path))
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []
        self._stream_id = -1

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(self, method: str, payload: bytes, *, service: str = TASK, timeout_s: float = 0) -> Any:
        """Make one call and return the code, message and payload of its answer."""
        self._stream_id += 2
        self.socket.sendall(
            encode_request(
                self._stream_id,
                service=service,
                method=method,
                payload=payload,
                timeout_nano=int(timeout_s * 1e9),
                metadata={},
            )
        )
        while True:
            frame = self._next()
            if frame.stream_id == self._stream_id:
                response = ttrpc_pb2.Response.FromString(frame.body)
                assert_contract(response.status.code, response.status.message)
                return response.status.code, response.status.message, response.payload

    def ask(self, method: str, request: Any) -> int:
        """Make one call with a message and return the code of its answer."""
        code: int = self.call(method, request.SerializeToString())[0]
        return code

    def _next(self) -> Frame:
        while not self._frames:
            data = self.socket.recv(1 << 20)
            assert data, "the shim hung up on a valid request"
            self._frames += [frame for frame in self._decoder.feed(data) if isinstance(frame, Frame)]
        return self._frames.pop(0)

    def say(self, data: bytes) -> list[Frame | OversizedFrame]:
        """Send any bytes while reading, and return what is answered at once."""
        self.socket.setblocking(False)
        frames: list[Frame | OversizedFrame] = []
        view = memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while view:
                    for _, events in selector.select(ANSWER_TIMEOUT_S):
                        if events & selectors.EVENT_WRITE:
                            view = view[self.socket.send(view) :]
                        if events & selectors.EVENT_READ:
                            received = self.socket.recv(1 << 20)
                            if not received:
                                return frames
                            frames += self._decoder.feed(received)
        return frames


class ServedShim:
    """The process of ``served_shim`` and the sockets it serves.

    :param directory: holds its sockets, its state and the bundles.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        spec = json.dumps({"process": {"args": ["true"], "cwd": "/"}, "root": {"path": "rootfs"}})
        self.bundle = self.write_bundle("bundle", spec)
        self._log = directory / "log"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.served_shim", str(self.directory)],
                cwd=_ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", self._log.read_text()
        self._witness = self.connect()
        self.channel = grpc.insecure_channel(f"unix:{self.directory / 'grpc'}")
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self._witness.socket.close()
        self.process.kill()
        self.process.communicate()

    def write_bundle(self, name: str, spec: str) -> Path:
        """Write a bundle with any text as its specification."""
        bundle = self.directory / name
        (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
        (bundle / "config.json").write_text(spec)
        return bundle

    def connect(self) -> TtrpcPeer:
        return TtrpcPeer(self.directory / "ttrpc")

    def assert_serves(self) -> None:
        """Check that another client's next valid request is answered."""
        code, message, payload = self._witness.call(
            "Connect", task_v3_pb2.ConnectRequest(id="box").SerializeToString()
        )
        assert code == 0, message
        assert task_v3_pb2.ConnectResponse.FromString(payload).shim_pid == self.process.pid

    def ensure_running(self, container: str = "box", exec_id: str = "shell") -> None:
        """Make sure that a container and an exec run, even if the last case ended them."""
        peer = self._witness
        if peer.ask("State", task_v3_pb2.StateRequest(id=container)):
            create = task_v3_pb2.CreateTaskRequest(id=container, bundle=str(self.bundle))
            assert peer.ask("Create", create) == 0
        state = task_v3_pb2.StateRequest(id=container)
        if task_v3_pb2.StateResponse.FromString(peer.call("State", state.SerializeToString())[2]).status == 1:
            assert peer.ask("Start", task_v3_pb2.StartRequest(id=container)) == 0
        spec = json.dumps({"args": ["true"], "cwd": "/"}).encode()
        request = task_v3_pb2.ExecProcessRequest(id=container, exec_id=exec_id)
        request.spec.value = spec
        if peer.ask("Exec", request) == 0:
            peer.ask("Start", task_v3_pb2.StartRequest(id=container, exec_id=exec_id))

    def remove(self, container: str) -> None:
        """Remove the container of this id if there is one."""
        peer = self._witness
        peer.ask("Kill", task_v3_pb2.KillRequest(id=container, signal=9, all=True))
        peer.ask("Wait", task_v3_pb2.WaitRequest(id=container))
        assert peer.ask("Delete", task_v3_pb2.DeleteRequest(id=container)) in {0, 5}

    def memory_bytes(self) -> int:
        """The resident memory of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def assert_sound(self) -> None:
        """Check that the process lives and has logged no defect."""
        assert self.process.poll() is None
        for line in self._log.read_text(errors="replace").splitlines():
            of_grpc_itself = "servicer method [/grpc." in line
            assert of_grpc_itself or not any(defect in line for defect in _DEFECTS), line


def header(length: int, *, stream_id: int = 1, kind: int = 1, flags: int = 0) -> bytes:
    return struct.pack(">IIBB", length, stream_id, kind, flags)
