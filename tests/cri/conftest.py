"""Every containerd behind its runtime interface, pods that many tests share, and a census around each."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cri import image
from tests.cri.pods import Container, Pod, remove_all, run_pod
from tests.cri.stack import HOME_PREFIX, Kind, Stack, opened_stack
from tests.e2e.conftest import COLD_RELEASE
from tests.e2e.containerd import RELEASES
from tests.e2e.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = [
    *(Kind(release=release, sandboxer="podsandbox") for release in RELEASES),
    Kind(release=RELEASES[-1], sandboxer="shim"),
    *(
        pytest.param(
            Kind(release=release, sandboxer="podsandbox", protocol="grpc"), marks=pytest.mark.nightly
        )
        for release in RELEASES
        if release.name == "1.7"
    ),
]
MAIN = "2.1-podsandbox"
_TEST_TIMEOUT_S = 900


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the same tests run under the runtime that Hako is compared with."""
    parser.addoption("--handler", default="hako", choices=["hako", "runc"], help="what runs the tests' pods")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark of this directory."""
    config.addinivalue_line("markers", f"mainly(STACK, ...): by day on these only; {MAIN} if none is named")


@pytest.hookimpl(tryfirst=True)  # before those that are not meant are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave repetitions on other stacks to the night, and give all time for the pods that they may start."""
    for item in items:
        if "tests/cri/" in item.nodeid and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TEST_TIMEOUT_S))
        mainly = item.get_closest_marker("mainly")
        if mainly is None or not isinstance(item, pytest.Function) or "stack" not in item.callspec.params:
            continue
        if str(item.callspec.params["stack"]) not in (mainly.args or (MAIN,)):
            item.add_marker(pytest.mark.nightly)


@pytest.fixture(scope="package")
def home(private_machine: None) -> Iterator[Path]:
    """A directory with a path short enough for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix=HOME_PREFIX, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="package")
def nursery(private_machine: None) -> Iterator[Nursery]:
    """The ancestor of every process that the tests start through containerd."""
    with Nursery() as opened:
        yield opened


@pytest.fixture(scope="package")
def archives(home: Path) -> list[Path]:
    """The images, ready to be imported."""
    return image.write_images(home)


@pytest.fixture(scope="package", params=KINDS, ids=str)
def stack(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, archives: list[Path]
) -> Iterator[Stack]:
    """Each containerd, and each way in which it can have its pods run."""
    kind, handler = request.param, request.config.getoption("--handler")
    if kind.sandboxer == "shim" and handler == "runc":
        pytest.skip("runc's shim has no Sandbox API")
    if kind.protocol == "grpc" and handler == "runc":
        pytest.skip("runc's shim has no gRPC")
    is_cold = kind.release.name == COLD_RELEASE or handler == "runc"
    templates = None if is_cold else request.getfixturevalue("templates")
    with opened_stack(home, nursery, archives, kind=kind, handler=handler, templates=templates) as opened:
        yield opened


EITHER = [
    pytest.param((kind, handler), id=f"{kind}-{handler}")
    for kind in (Kind(release=release, sandboxer="podsandbox") for release in RELEASES[1:])
    for handler in ("runc", "hako")
]


@pytest.fixture(scope="package", params=EITHER)
def either_stack(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, archives: list[Path]
) -> Iterator[Stack]:
    """The two newest containerds, each with runc's pods and Hako's: what runc does is the right behaviour."""
    kind, handler = request.param
    templates = request.getfixturevalue("templates") if handler == "hako" else None
    place = home / handler
    place.mkdir(exist_ok=True)
    with opened_stack(place, nursery, archives, kind=kind, handler=handler, templates=templates) as opened:
        yield opened


@contextlib.contextmanager
def counted(stack: Stack) -> Iterator[None]:
    """See that nothing is left when a block is over."""
    before = stack.census()
    yield
    changes = stack.difference(before)
    assert not changes, "\n".join(["left behind, or taken away:", *changes])


@pytest.fixture(autouse=True)
def containerd_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show what containerd logged during a test, if the test fails."""
    name = next((name for name in ("stack", "either_stack") if name in request.fixturenames), None)
    if name is None:
        yield
        return
    found: Stack = request.getfixturevalue(name)
    log = found.containerd.log
    start = log.stat().st_size
    try:
        yield
    finally:
        with log.open("rb") as opened:
            opened.seek(start)
            print(opened.read().decode(errors="replace")[-20000:])


@pytest.fixture
def new_pod(stack: Stack) -> Iterator[Callable[..., Pod]]:
    """Run pods, remove them after the test, and check that nothing is left of them."""
    with _new_pods(stack) as make:
        yield make


@pytest.fixture
def new_either_pod(either_stack: Stack) -> Iterator[Callable[..., Pod]]:
    """As ``new_pod``, on ``either_stack``."""
    with _new_pods(either_stack) as make:
        yield make


@contextlib.contextmanager
def _new_pods(stack: Stack) -> Iterator[Callable[..., Pod]]:
    pods: list[Pod] = []

    def make(name: str, **wanted: Any) -> Pod:
        pods.append(run_pod(stack, name, **wanted))
        return pods[-1]

    with counted(stack):
        try:
            yield make
        finally:
            remove_all(pods)


@dataclass(frozen=True, slots=True)
class Duo:
    """A pod with a server and a worker beside it, and another pod on the same bridge."""

    pod: Pod
    server: Container
    worker: Container
    neighbour: Pod
    caller: Container


@pytest.fixture(scope="package")
def duo(stack: Stack) -> Iterator[Duo]:
    """Two pods that many tests share; nothing is left of them at the end."""
    pods: list[Pod] = []
    with counted(stack):
        try:
            pods.append(run_pod(stack, "duo"))
            server = pods[0].run("server", *image.PEER_COMMAND, "serve", str(image.PORT))
            worker = pods[0].run("worker", "sh", "-c", "echo ready; exec sleep 100000")
            pods.append(run_pod(stack, "neighbour"))
            caller = pods[1].run("caller", "sleep", "100000")
            server.wait_for_line("serving")
            worker.wait_for_line("ready")
            yield Duo(pods[0], server, worker, pods[1], caller)
        finally:
            remove_all(pods)
