"""What a pod's containers share on the host they share as two processes of the host would."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.cri import image
from tests.cri.conftest import counted
from tests.cri.pods import remove_all, run_pod

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cri.pods import Container, Pod
    from tests.cri.stack import Stack

ALL = {"flock", "fcntl", "socket", "mmap", "fifo", "inotify"}
READ = (ALL - {"inotify"}) | {"Read-only file system"}


@dataclass(frozen=True)
class Pair:
    """A directory of the host that two containers have, of whom the first is created before the second.

    :param first: what the first container is given: a path on the host, and where in that the directory is.
    :param second: what the second is given.
    :param served_by: in which of them the serving program runs.
    :param readonly: whether the other one cannot write in it.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    served_by: str = "first"
    readonly: bool = False

    def in_container(self, number: int, side: str) -> str:
        """Name the directory as a container has it."""
        return f"/{number}/{getattr(self, side)[1]}".rstrip("/")


EMPTY_DIR = "pods/7/volumes/kubernetes.io~empty-dir"
SUBPATH = "pods/7/volume-subpaths"
PAIRS = {
    "one directory": Pair(("one", ""), ("one", "")),
    "an emptyDir": Pair((f"{EMPTY_DIR}/one", ""), (f"{EMPTY_DIR}/one", "")),
    "a tmpfs": Pair(("tmpfs", ""), ("tmpfs", "")),
    "to read": Pair(("read", ""), ("read", ""), readonly=True),
    "to read, first": Pair(("first", ""), ("first", ""), served_by="second", readonly=True),
    "a part later": Pair(("parent", "deep/sub"), ("parent/deep/sub", "")),
    "a part first": Pair(("whole/deep/sub", ""), ("whole", "deep/sub")),
    "a part to read": Pair(("papers", "sub"), ("papers/sub", ""), readonly=True),
    "a part of what is to read": Pair(("archive/sub", ""), ("archive", "sub"), readonly=True),
    "a subPath later": Pair((f"{EMPTY_DIR}/parent", "sub"), (f"{SUBPATH}/parent", "")),
    "a subPath first": Pair((f"{SUBPATH}/whole", ""), (f"{EMPTY_DIR}/whole", "sub")),
    "a bind of it": Pair(("bound", ""), ("elsewhere", "")),
}
BINDS = {
    "elsewhere": "bound",
    f"{SUBPATH}/parent": f"{EMPTY_DIR}/parent/sub",
    f"{SUBPATH}/whole": f"{EMPTY_DIR}/whole/sub",
}


@pytest.fixture(scope="module")
def place(either_stack: Stack) -> Iterator[Path]:
    """The volumes on the host, some of them mounted where the kubelet mounts a subPath."""
    path = either_stack.containerd.home / "sharing"
    for pair in PAIRS.values():
        for source, below in (pair.first, pair.second):
            (path / source / below).mkdir(parents=True, exist_ok=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", path / "tmpfs"], check=True)
    for target, source in BINDS.items():
        subprocess.run(["/usr/bin/mount", "--bind", path / source, path / target], check=True)
    yield path
    for mounted in ("tmpfs", *BINDS):
        subprocess.run(["/usr/bin/umount", path / mounted], check=True)


def mounts(place: Path, side: str) -> list[dict[str, Any]]:
    return [
        {
            "container_path": f"/{number}",
            "host_path": str(place / getattr(pair, side)[0]),
            "readonly": pair.readonly and pair.served_by != side,
        }
        for number, pair in enumerate(PAIRS.values())
    ]


def run(pod: Pod, side: str, place: Path) -> Container:
    """Run a container that serves its part of the pairs."""
    served = [
        pair.in_container(number, side)
        for number, pair in enumerate(PAIRS.values())
        if pair.served_by == side
    ]
    container = pod.run(side, *image.SHARING_COMMAND, "serve", *served, mounts=mounts(place, side))
    container.wait_for_line("serving")
    return container


@pytest.fixture(scope="module")
def seen(either_stack: Stack, place: Path) -> Iterator[dict[str, list[str]]]:
    """What the containers have seen of each other, by the kind of pair."""
    pods: list[Pod] = []
    with counted(either_stack):
        try:
            pods.append(run_pod(either_stack, "sharing"))
            first, second = run(pods[0], "first", place), run(pods[0], "second", place)
            found: dict[str, list[str]] = {}
            for side, container in (("first", first), ("second", second)):
                met = {
                    pair.in_container(number, side): name
                    for number, (name, pair) in enumerate(PAIRS.items())
                    if pair.served_by != side
                }
                done = container.exec(*image.SHARING_COMMAND, "meet", *met)
                assert (done.code, done.stderr) == (0, "")
                found |= {met[path]: sorted(what) for path, what in json.loads(done.stdout).items()}
            yield found
        finally:
            remove_all(pods)


@pytest.mark.parametrize("pair", PAIRS)
def test_containers_meet_in_a_directory_that_both_have(seen: dict[str, list[str]], pair: str):
    assert seen[pair] == sorted(READ if PAIRS[pair].readonly else ALL)
