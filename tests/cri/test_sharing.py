"""A pod's containers share files of the host as two processes on the host would."""

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
    """A directory of the host that two containers have; the first is created before the second.

    :param first: the first container's volume: a path on the host, and the directory's place in it.
    :param second: the same for the second container.
    :param served_by: in which of them the serving program runs.
    :param readonly: whether the other one cannot write in it.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    served_by: str = "first"
    readonly: bool = False

    def in_container(self, number: int, side: str) -> str:
        """Name the directory as a container has it."""
        return f"/{side}/{number}/{getattr(self, side)[1]}".rstrip("/")


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
ARRANGEMENTS = ("two", "one")
"""Whether two containers have the sides of a pair, or one has both."""
BINDS = {
    "elsewhere": "bound",
    f"{SUBPATH}/parent": f"{EMPTY_DIR}/parent/sub",
    f"{SUBPATH}/whole": f"{EMPTY_DIR}/whole/sub",
}


@pytest.fixture(scope="module")
def place(either_stack: Stack) -> Iterator[Path]:
    """The volumes on the host, some of them mounted where the kubelet mounts a subPath."""
    path = either_stack.containerd.home / "sharing"
    mounted = []
    for arrangement in ARRANGEMENTS:
        for pair in PAIRS.values():
            for source, below in (pair.first, pair.second):
                (path / arrangement / source / below).mkdir(parents=True, exist_ok=True)
        mounted.append(path / arrangement / "tmpfs")
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", mounted[-1]], check=True)
        for target, source in BINDS.items():
            mounted.append(path / arrangement / target)
            argv: list[str | Path] = ["/usr/bin/mount", "--bind", path / arrangement / source, mounted[-1]]
            subprocess.run(argv, check=True)
    yield path
    for mount_point in mounted:
        subprocess.run(["/usr/bin/umount", mount_point], check=True)


def mounts(place: Path, side: str) -> list[dict[str, Any]]:
    return [
        {
            "container_path": f"/{side}/{number}",
            "host_path": str(place / getattr(pair, side)[0]),
            "readonly": pair.readonly and pair.served_by != side,
        }
        for number, pair in enumerate(PAIRS.values())
    ]


def run(pod: Pod, name: str, place: Path, sides: tuple[str, ...]) -> Container:
    """Run a container that has one side of the pairs or both, and serves its side."""
    pairs = enumerate(PAIRS.values())
    served = [pair.in_container(number, pair.served_by) for number, pair in pairs if pair.served_by in sides]
    given = [mount for side in sides for mount in mounts(place, side)]
    container = pod.run(name, *image.SHARING_COMMAND, "serve", *served, mounts=given)
    container.wait_for_line("serving")
    return container


def meet(container: Container, sides: tuple[str, ...]) -> dict[str, list[str]]:
    """Return a container's observations of the pairs that are not served from these sides."""
    met = {
        pair.in_container(number, other): name
        for number, (name, pair) in enumerate(PAIRS.items())
        for other in ("first", "second")
        if other in sides and pair.served_by != other
    }
    done = container.exec(*image.SHARING_COMMAND, "meet", *met)
    assert (done.code, done.stderr) == (0, "")
    return {met[path]: sorted(what) for path, what in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def seen(either_stack: Stack, place: Path) -> Iterator[dict[str, dict[str, list[str]]]]:
    """The observations of each other, by arrangement and kind of pair."""
    pods: list[Pod] = []
    with counted(either_stack):
        try:
            pods.append(run_pod(either_stack, "sharing"))
            first = run(pods[0], "first", place / "two", ("first",))
            second = run(pods[0], "second", place / "two", ("second",))
            both = run(pods[0], "both", place / "one", ("first", "second"))
            two = meet(first, ("first",)) | meet(second, ("second",))
            yield {"two": two, "one": meet(both, ("first", "second"))}
        finally:
            remove_all(pods)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_processes_meet_in_a_directory_that_containers_have(
    seen: dict[str, dict[str, list[str]]], pair: str, arrangement: str
) -> None:
    assert seen[arrangement][pair] == sorted(READ if PAIRS[pair].readonly else ALL)
