"""Many shims without machines: processes that serve the real services on the real sockets.

``python -m tests.integration.shim.light_shims STATE_DIR COUNT`` prints the process of each as soon as all of
them serve, and ends them when its standard input ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from proto.hako import metrics_pb2
from shim.host import state_directory
from shim.host.ledger import SHIM_PROCESS, Ledger
from shim.host.state_directory import StartRecord
from shim.sandbox.life import Life
from shim.services import management
from shim.services.metrics import MetricsService
from shim.telemetry.event_feed import EventFeed
from shim.transport.dispatch import Dispatch
from shim.transport.ttrpc_server import TtrpcServer

NAMESPACE = "many"


def name_of(number: int) -> str:
    """Name the sandbox of a shim."""
    return f"light-{number:02}"


def record_of(state_dir: Path, number: int) -> StartRecord:
    """Describe how a shim was started."""
    directory = state_dir / f"{number:016x}"
    return StartRecord(
        namespace=NAMESPACE,
        id=name_of(number),
        bundle=str(directory),
        grpc_address="",
        ttrpc_address="",
        publish_binary="",
        config_text="",
        config_source="",
        protocol="ttrpc",
        socket_path=str(directory / "ttrpc.sock"),
        state_directory=str(directory),
        debug=False,
        dialect="1.7",
        started_at=time.time(),
    )


def listen(record: StartRecord) -> socket.socket:
    """Leave what `start` leaves."""
    Path(record.state_directory).mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(record.socket_path)
    listener.listen()
    state_directory.write_record(record)
    return listener


async def serve(record: StartRecord, listener: socket.socket, serving: int) -> None:
    """Serve what operators' tools ask, for a sandbox whose machine has still to boot.

    :param serving: a descriptor to which a byte is written when it serves.
    """
    sandbox: Any = SimpleNamespace(
        id=record.id,
        namespace=record.namespace,
        state=Life.BOOTING,
        reason_of_end="",
        created_at_s=record.started_at,
        is_ready=False,
        pod=SimpleNamespace(oci={}),
        directory=Path(record.state_directory),
    )
    containers: Any = SimpleNamespace(all={}, parking=SimpleNamespace(condition="booting"))
    machine: Any = SimpleNamespace(processes=list)
    operators = management.ManagementService(
        record,
        machine=machine,
        sandbox=sandbox,
        containers=containers,
        feed=EventFeed(),
        over=asyncio.Event(),
        allows_exec=False,
    )
    metrics = metrics_pb2.DESCRIPTOR.services_by_name["Metrics"]
    services = [(metrics, MetricsService(sandbox, containers, machine)), (management.SERVICE, operators)]
    asyncio.get_running_loop().call_soon(os.write, serving, b".")
    await TtrpcServer(Dispatch(services)).serve(listener)


def main(state_dir: Path, count: int) -> None:
    """Run them until the standard input ends."""
    children = []
    told, serving = os.pipe()
    for record in (record_of(state_dir, number) for number in range(count)):
        listener = listen(record)
        child = os.fork()
        if child == 0:
            asyncio.run(serve(record, listener, serving))
            os._exit(0)
        listener.close()
        ledger = Ledger(record.state_directory, create=True)
        ledger.process(child, name=SHIM_PROCESS)
        ledger.close()
        children.append(child)
    os.close(serving)
    awaited = count
    while awaited:
        written = len(os.read(told, awaited))
        assert written, "one has ended"
        awaited -= written
    print(*children, flush=True)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
