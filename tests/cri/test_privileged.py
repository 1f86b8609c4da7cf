"""A privileged container of a pod is as mighty as its machine, and reaches no file that it was not given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cri.conftest import Duo
    from tests.cri.pods import Container

pytestmark = pytest.mark.mainly
CONTENT = "only the host's"


@pytest.fixture(scope="module")
def secret(duo: Duo) -> Iterator[Path]:
    """A file of the host's, beside the directory that the container is given."""
    directory = duo.pod.stack.containerd.home / "privileged"
    for name in ("given", "fixed"):
        (directory / name).mkdir(parents=True)
    file = directory / "secret"
    file.write_text(CONTENT, encoding="utf-8")
    yield file
    assert file.read_text(encoding="utf-8") == CONTENT
    assert not (directory / "fixed" / "written").exists()


@pytest.fixture(scope="module")
def privileged(duo: Duo, secret: Path) -> Iterator[Container]:
    """A privileged container with a writable and a read-only volume."""
    if not duo.pod.stack.is_hako:
        pytest.skip("under this runtime it is as mighty as the host")
    container = duo.pod.run(
        "privileged",
        "sleep",
        "100000",
        mounts=[
            {"container_path": "/given", "host_path": str(secret.parent / "given")},
            {"container_path": "/fixed", "host_path": str(secret.parent / "fixed"), "readonly": True},
        ],
        linux=duo.pod.linux(privileged=True),
    )
    yield container
    container.remove()


def test_it_may_mount(privileged: Container) -> None:
    assert privileged.shell("mkdir /mine && mount -t tmpfs mine /mine && umount /mine").code == 0


def test_paths_and_links_never_lead_above_the_given_directory(privileged: Container, secret: Path) -> None:
    tries = (
        "cat /given/../secret",
        f"cat {secret}",
        f"ln -sf {secret} /given/link; cat /given/link",
        "ln -sf ../secret /given/up; cat /given/up",
        f"ln -sfn / /given/root; cat /given/root{secret}",
        f"cat /proc/1/root{secret}",
        f"nsenter --target 1 --mount cat {secret}",
    )
    seen = [privileged.shell(script) for script in tries]
    assert [done.code == 0 or CONTENT in done.stdout for done in seen] == [False] * len(tries)


def test_the_share_mounted_anew_holds_nothing_else(privileged: Container, secret: Path) -> None:
    script = (
        f"mkdir -p /all && mount -t virtiofs kataShared /all && find /all -name {secret.name}; umount /all"
    )
    assert privileged.shell(script, timeout_s=200).stdout == ""


def test_a_read_only_volume_stays_so_however_it_is_mounted(privileged: Container) -> None:
    script = (
        "mount -o remount,rw /fixed; mount -o remount,bind,rw /fixed; echo bad >/fixed/written; "
        "mkdir /again; mount --bind /fixed /again; mount -o remount,bind,rw /again; echo bad >/again/written"
    )
    done = privileged.shell(script)
    assert done.code != 0
    assert done.stderr.count("Read-only file system") >= 2
