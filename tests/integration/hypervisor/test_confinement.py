"""A process that a guest talks to owns nothing: tried from inside, by a program in its place."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import secrets
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from hypervisor import Accelerator
from hypervisor.confinement import (
    FILE_CAPABILITIES,
    Confinement,
    of_qemu,
    of_share_daemon,
    of_vsock_daemon,
)
from hypervisor.launcher import launch
from hypervisor.process import ChildProcess
from hypervisor.seclusion import show_share_only
from tests.patience import patient
from tests.waiting import reached

from .conftest import JAIL

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor import VmSpec

PROBE = Path(__file__).with_name("confined_probe.py")
PYTHON = Path("/usr/bin/python3")
END_S = patient(60)

CONFINED: dict[str, Callable[[VmSpec], Confinement | None]] = {
    "QEMU": lambda spec: of_qemu(spec, boots=True),
    "QEMU with KVM and devices of the host": lambda spec: of_qemu(
        dataclasses.replace(spec, accelerator=Accelerator.KVM, root_ports=1), boots=False
    ),
    "virtio-fs daemon": lambda spec: of_share_daemon(spec, drops_by_itself=False),
    "vsock daemon": lambda spec: of_vsock_daemon(spec, PYTHON),
}


async def run(confinement: Confinement, *argv: str) -> ChildProcess:
    process = ChildProcess.spawn("probe", argv, confinement=confinement)
    async with asyncio.timeout(END_S):
        await process.exited
    return process


@pytest.fixture(params=CONFINED)
async def found(
    request: pytest.FixtureRequest, make_spec: Callable[..., VmSpec], tmp_path: Path
) -> dict[str, Any]:
    """The probe's findings in the place of each process."""
    confinement = CONFINED[request.param](make_spec())
    assert confinement is not None
    secret = tmp_path / "secret"
    secret.write_text("of another sandbox")
    secret.chmod(0o644)
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        # The program itself is shown to it, as another file that it needs.
        paths = ("/etc/shadow", "/etc/passwd", str(secret))
        script = PROBE.read_text(encoding="utf-8")
        process = await run(confinement, str(PYTHON), "-ISBc", script, str(os.getpid()), name, *paths)
    assert process.exited.result().code == 0, process.output()
    return {"confined": confinement, **json.loads(process.output())}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def capabilities(mask: str) -> set[int]:
    return {number for number in range(64) if int(mask, 16) >> number & 1}


async def test_a_confined_process_owns_nothing_of_the_host(found: dict[str, Any]) -> None:
    status, kept = found["status"], set(found["confined"].capabilities)
    assert status["Uid"].split() == [str(JAIL.uid)] * 4
    assert status["Gid"].split() == [str(JAIL.gid)] * 4
    assert status["Groups"] == ""
    assert all(capabilities(status[f"Cap{one}"]) == kept for one in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
    assert kept <= set(FILE_CAPABILITIES)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # Its own processes are all that there are.
    assert (found["pid"], found["processes"]) == (1, ["1"])
    # No file of the host, through either root.
    assert set(map(tuple, found["read"].values())) == {("ENOENT",)}
    assert set(found["root"]) <= {
        *(
            "bin",
            "dev",
            "etc",
            "lib",
            "lib32",
            "lib64",
            "libx32",
            "proc",
            "sbin",
            "share",
            "sys",
            "usr",
            "var",
        ),
    }
    assert set(found["writes"].values()) <= {"EROFS", "ENOENT", "EACCES"}
    assert set(found["descriptors"]) <= {0, 1, 2, 3}


async def test_a_confined_process_changes_nothing_of_the_kernel_even_as_root(found: dict[str, Any]) -> None:
    assert found["writable"] == []


async def test_a_confined_process_is_refused_the_system_calls_that_lead_out(found: dict[str, Any]) -> None:
    refused = {"clone3": "ENOSYS", "x32 getpid": "ENOSYS", "kill": "ESRCH"}
    assert found["calls"] == {name: refused.get(name, "EPERM") for name in found["calls"]}


async def test_a_confined_process_has_no_network(found: dict[str, Any]) -> None:
    # One that may act as root makes no sockets at all.
    unix, reached = ("done", "ECONNREFUSED") if found["confined"].keeps_identity else ("EPERM", "EPERM")
    assert found["families"].pop("unix") == unix
    assert set(found["families"].values()) == {"EPERM"}
    assert found["interfaces"] == ["lo"]
    assert found["abstract"] == reached


async def test_a_confined_process_leaves_no_core_and_has_the_files_that_the_host_allows(
    found: dict[str, Any],
) -> None:
    assert found["messages"] == [0, 0]
    assert max(found["signals"]) <= 1024
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = found["confined"].open_files
    assert found["core"] == [0, 0]
    assert found["files"] in ([files, files], [most, most])


@pytest.mark.parametrize(("is_opened", "place"), [(True, "."), (False, "share")])
async def test_a_share_daemon_keeps_its_share_alone_under_the_path_that_it_will_open(
    make_spec: Callable[..., VmSpec], is_opened: bool, place: str
) -> None:
    spec = make_spec()
    confinement = of_share_daemon(spec, drops_by_itself=is_opened)
    assert confinement is not None
    process = ChildProcess.spawn("probe", ["/usr/bin/sleep", "1000"], confinement=confinement)
    try:
        await reached(lambda: Path(f"/proc/{process.pid}/comm").read_text(encoding="ascii") == "sleep\n")
        await show_share_only(process.pid, is_opened=is_opened)
        (spec.share_source / "made later").touch()

        root = Path(f"/proc/{process.pid}/root")
        assert "made later" in names(root / place)
        assert names(root) == (names(spec.share_source) if is_opened else {"dev", "share"})
    finally:
        process.kill()
        await process.exited


async def test_a_crash_is_seen_although_the_process_is_the_first_of_its_namespace(
    make_spec: Callable[..., VmSpec],
) -> None:
    confinement = of_vsock_daemon(make_spec(), PYTHON)
    assert confinement is not None
    process = await run(confinement, str(PYTHON), "-ISc", "import ctypes; ctypes.string_at(0)")
    assert process.exited.result().signal == signal.SIGSEGV


async def test_a_failed_confinement_names_the_step(make_spec: Callable[..., VmSpec]) -> None:
    spec = make_spec(network_namespace=Path("/nonexistent/namespace"))
    confinement = of_qemu(spec, boots=False)
    assert confinement is not None
    process = await run(confinement, str(PYTHON))
    assert process.obituary() == (
        "probe exited with status 125: jail: /nonexistent/namespace: No such file or directory"
    )


def launch_and_die(confinement: Confinement, told: int) -> NoReturn:
    """Start a program, tell its id, and end as soon as it runs; to be called in a separate process."""
    try:
        child = launch(
            ["/usr/bin/sleep", "1000"], {}, output=1, inherit=(), confinement=confinement, huge_pages=True
        )
        while Path(f"/proc/{child}/comm").read_text(encoding="ascii") != "sleep\n":
            time.sleep(0.001)
        os.write(told, str(child).encode())
    finally:
        os._exit(0)


def test_a_confined_process_ends_with_its_parent(make_spec: Callable[..., VmSpec]) -> None:
    confinement = of_vsock_daemon(make_spec(), PYTHON)
    assert confinement is not None
    read_end, write_end = os.pipe()
    parent = os.fork()
    if parent == 0:
        launch_and_die(confinement, write_end)
    os.close(write_end)
    child = int(os.read(read_end, 16))
    os.close(read_end)
    os.waitpid(parent, 0)
    # An orphan comes to the subreaper.
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
