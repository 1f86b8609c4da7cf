"""Anything that QEMU says on its control connection at worst breaks that connection; it never hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypervisor.errors import QmpError
from hypervisor.qmp import QmpSession
from tests.fuzz.material import bent, json_values
from tests.patience import patient

if TYPE_CHECKING:
    from typing import Any


CASES = settings().max_examples
STEP_TIMEOUT_S = patient(40)
PATIENCE_S = 0.02

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}
}
STAMP = {"seconds": 1, "microseconds": 0}
STOP = {"event": "STOP", "timestamp": STAMP}
SHUTDOWN = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": STAMP}
OK = {"return": {}, "id": "ID"}
RUNNING = {"return": {"status": "running", "running": True, "singlestep": False}, "id": "ID"}
REFUSED = {"error": {"class": "GenericError", "desc": "no"}, "id": "ID"}


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


valid = st.sampled_from([line(message) for message in (GREETING, STOP, SHUTDOWN, OK, RUNNING, REFUSED)])
shaped = st.one_of(
    st.builds(lambda value: line({"return": value, "id": "ID"}), json_values),
    st.builds(lambda value: line({"error": value, "id": "ID"}), json_values),
    st.builds(
        lambda name, value: line({"event": name, "data": value}),
        st.sampled_from(["STOP", "SHUTDOWN"]),
        json_values,
    ),
    st.builds(lambda name: line({"event": name}), json_values),
    json_values.map(line),
)
chunks = st.one_of(valid, shaped, bent(valid), st.binary(max_size=40))
HONEST_START = [line(GREETING), line({"return": {}})]


async def converse(said: Any) -> None:
    """Run a session with a peer that says one thing first and after each command."""
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    with ExitStack() as handover:
        session = QmpSession("fuzz", handover=handover)
        peer = socket.socket(fileno=socket.dup(session.qemu_fd))
    peer.setblocking(False)
    talking = asyncio.create_task(talk(peer, said))
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            with contextlib.suppress(QmpError):
                await session.connect()
                assert isinstance(await session.run_state(), str)
            await session.drained()
    finally:
        talking.cancel()
        peer.close()
        await session.close()
    assert session.shutdown is None or isinstance(session.shutdown.cause, str)
    assert failures == []


async def talk(peer: Any, said: Any) -> None:
    loop = asyncio.get_running_loop()
    # Without an answer the session waits, as it should, until the peer hangs up.
    with contextlib.suppress(ConnectionError, TimeoutError):
        for index, chunk in enumerate(said):
            received = b"{}"
            if index:
                async with asyncio.timeout(PATIENCE_S):
                    received = await loop.sock_recv(peer, 4096)
            identity = str(json.loads(received).get("id")).encode() if received else b""
            await loop.sock_sendall(peer, chunk.replace(b"ID", identity))
    peer.close()


@settings(max_examples=2 * CASES)
@given(
    said=st.one_of(st.lists(chunks, max_size=5), st.lists(chunks, max_size=4).map(lambda c: HONEST_START + c))
)
@example(said=[*HONEST_START, line({"return": {}, "id": "ID"})])
@example(said=[*HONEST_START, line({"event": "SHUTDOWN"})])
@example(said=[*HONEST_START, line({"event": "SHUTDOWN", "data": {"guest": 1, "reason": []}})])
@example(said=[*HONEST_START, line({"event": []})])
@example(said=[*HONEST_START, b"x" * (11 << 20) + b"\n"])
@example(said=[*HONEST_START, b"[" * 5000 + b"\n"])
@example(said=[line(GREETING), b"\xff\n"])
@example(said=[*HONEST_START, line({"return": 1, "id": "other"})])
@example(said=[*HONEST_START, line(RUNNING) * 3])
def test_any_conversation(said: Any) -> None:
    asyncio.run(converse(said))
