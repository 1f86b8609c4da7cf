"""Permissions to the files of a container's volumes: the host's kernel sets the standard."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.interpreter import interpreter, run_on_the_host
from tests.e2e.programs.access_lists import ACCESS, encoded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack
    from tests.e2e.interpreter import Interpreter


@pytest.fixture(scope="module")
def open_directory() -> Iterator[Path]:
    """A directory that every user of the host can enter."""
    with tempfile.TemporaryDirectory(prefix="hako-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="module")
def volume(open_directory: Path) -> Path:
    path = open_directory / "volume"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def box(either_stack: Stack, volume: Path) -> Iterator[Interpreter]:
    with interpreter(either_stack, binds={volume: "/volume"}) as opened:
        yield opened


@pytest.mark.parametrize(
    ("program", "place"),
    [("permissions", "/volume"), ("access_lists", "/volume"), ("access_lists", "/root")],
)
def test_a_container_has_the_rights_to_files_that_its_users_have_on_the_host(
    box: Interpreter, open_directory: Path, program: str, place: str
) -> None:
    with tempfile.TemporaryDirectory(dir=open_directory) as on_host:
        Path(on_host).chmod(0o755)
        expected = run_on_the_host(program, f"{on_host}/{program}")

    directory = f"{place}/{program}"
    assert box.run(program, directory).splitlines() == expected.splitlines()
    box.execute("rm", "-r", directory)


def test_a_list_that_the_host_has_set_is_enforced(box: Interpreter, volume: Path) -> None:
    denied, allowed = volume / "denied", volume / "allowed"
    denied.write_text("secret")
    allowed.write_text("known")
    denied.chmod(0o644)
    allowed.chmod(0o600)
    os.setxattr(denied, ACCESS, encoded("u::rw- u:1000:--- g::r-- m::r-- o::r--"))
    os.setxattr(allowed, ACCESS, encoded("u::rw- u:1000:r-- g::--- m::r-- o::---"))

    assert box.run("read_as", "1000", "/volume/denied", "/volume/allowed").split() == ["EACCES", "known"]
    assert box.run("read_as", "1001", "/volume/denied", "/volume/allowed").split() == ["secret", "EACCES"]


@pytest.mark.inherent("fallocate-set-id")
def test_space_reserved_by_another_than_root_costs_a_program_its_set_id_bits(box: Interpreter) -> None:
    box.execute("sh", "-c", "echo > /root/program; chown 1000 /root/program; chmod 4755 /root/program")
    box.execute("chmod", "755", "/root")
    user = ["/usr/bin/setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
    box.execute(*user, "/usr/bin/fallocate", "--length", "4096", "/root/program")
    assert box.ask("stat", "-c", "%a", "/root/program") == "755\n"
