"""Only root can connect to a sandbox's sockets or read its state directory."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.host import state_directory
from shim.transport.dispatch import Dispatch
from shim.transport.grpc_server import serve_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from tests.unit.shim.conftest import Containerd


NOBODY = 65534


def error_as(uid: int, attempt: Callable[..., Any]) -> int:
    """Return the error number of an attempt by another user's process; 0 if it succeeds."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            attempt()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def connecting_to(path: Path) -> Callable[[], None]:
    def attempt() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))

    return attempt


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can enter, so that only the files in it can deny access."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_other_users_cannot_connect_to_the_socket_that_start_makes(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    assert containerd.run("start", "c1").returncode == 0
    path = Path(containerd.socket_path("c1"))
    # A hard link in a directory that every user can enter, on the same file system.
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as public:
        Path(public).chmod(0o755)
        (Path(public) / "socket").hardlink_to(path)
        assert error_as(0, connecting_to(Path(public) / "socket")) == 0
        assert error_as(NOBODY, connecting_to(Path(public) / "socket")) == errno.EACCES
    assert error_as(NOBODY, connecting_to(path)) == errno.EACCES


async def test_other_users_cannot_connect_to_the_grpc_socket(public: Path) -> None:
    async with serve_grpc(Dispatch([]), public / "grpc.sock"):
        assert error_as(0, connecting_to(public / "grpc.sock")) == 0
        assert error_as(NOBODY, connecting_to(public / "grpc.sock")) == errno.EACCES


def test_other_users_cannot_read_the_state_directory(public: Path) -> None:
    path = public / "state"
    os.close(state_directory.lock(str(path)))
    (path / "grpc.sock").touch()
    assert error_as(NOBODY, lambda: list(path.iterdir())) == errno.EACCES
    assert error_as(NOBODY, (path / "grpc.sock").stat) == errno.EACCES
