"""Three real containerds, a private place for them, and a census around every test."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from shim.commands import shims
from tests import host_settings
from tests.e2e import busybox, census
from tests.e2e.containerd import RELEASES, Containerd, Release, running
from tests.e2e.nursery import Nursery
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shim.host.state_directory import StartRecord

HAKO = "io.containerd.hako.v2"
RUNC = "io.containerd.runc.v2"
DEFAULT_BOOT_S = 45
"""Less than tests.e2e.containerd.CALL_TIMEOUT_S, so that the shim says why a machine does not come up."""
COLD_RELEASE = "1.6"
"""The containerd whose machines all boot; those of the others are clones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A containerd and the protocol over which it drives the shim."""

    containerd: Containerd
    protocol: str
    state_directory: Path
    config: Path

    @property
    def is_hako(self) -> bool:
        """Tell whether the runtime is the one of this project and not one it is compared with."""
        return self.containerd.runtime == HAKO

    def record(self, sandbox_id: str) -> StartRecord:
        """Tell how a sandbox was started."""
        known = shims.records(str(self.state_directory))
        return next(each for each in known if each.id == sandbox_id)


def write_config(
    path: Path,
    *,
    state_directory: Path,
    protocol: str = "ttrpc",
    templates: Path | None = None,
    **tables: str,
) -> Path:
    """Write a configuration of Hako.

    :param path: the file to write.
    :param state_directory: where sandboxes keep their state.
    :param protocol: how containerd drives the shim.
    :param templates: the store of what machines are cloned from; None boots them cold.
    :param tables: the body of further tables by name; those of ``shim`` and ``hypervisor`` are appended to.
    """
    tables["hypervisor"] = host_settings.hypervisor_table(tables.get("hypervisor", ""))
    if host_settings.INITRD:
        templates = None
    if "template" not in tables["hypervisor"]:
        cloning = f'template = "auto"\ntemplate_dir = "{templates}"' if templates else 'template = "off"'
        tables["hypervisor"] += f"\n{cloning}"
    shim = (
        f'protocol = "{protocol}"\nstate_dir = "{state_directory}"\n'
        f'log_dir = "{state_directory.parent / "log"}"\n{tables.pop("shim", "")}'
    )
    guest = tables.get("guest", f"boot_timeout_s = {patient(DEFAULT_BOOT_S):.0f}\n")
    tables["guest"] = host_settings.guest_table(guest)
    bodies = {"shim": shim, **tables}
    path.write_text("".join(f"[{name}]\n{body}\n" for name, body in bodies.items()), encoding="utf-8")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the same tests run under the runtime that Hako is compared with."""
    parser.addoption("--runtime", default=HAKO, help="the containerd runtime that the e2e tests run")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks of this directory."""
    config.addinivalue_line("markers", "hako: has no meaning under another runtime")
    config.addinivalue_line("markers", "mostly_on(STACK): only nightly on any other stack")


@pytest.hookimpl(tryfirst=True)  # before those that are not meant are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that another runtime cannot pass, and repeat others on more stacks only nightly."""
    for item in items:
        if item.get_closest_marker("hako") and config.getoption("--runtime") != HAKO:
            item.add_marker(pytest.mark.skip(reason="only Hako is meant"))
        mostly = item.get_closest_marker("mostly_on")
        if mostly and isinstance(item, pytest.Function):
            release, protocol = cast("tuple[Release, str]", item.callspec.params["stack"])
            if f"{release.name}-{protocol}" != mostly.args[0]:
                item.add_marker(pytest.mark.nightly)


def pytest_report_header() -> list[str]:
    """Name the exact containerd behind each release."""
    lines = []
    for release in RELEASES:
        with contextlib.suppress(FileNotFoundError):
            argv = [str(release.programs / "containerd"), "--version"]
            version = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[2]
            lines.append(f"containerd {release.name}: {version}")
    return lines


@pytest.fixture(scope="session")
def home(private_machine: None) -> Iterator[Path]:
    """A directory with a path short enough for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix="hako-e2e-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def nursery(private_machine: None) -> Iterator[Nursery]:
    """The ancestor of every process that the tests start through containerd."""
    with Nursery() as opened:
        yield opened


@pytest.fixture(scope="session")
def image_archive(home: Path) -> Path:
    """The busybox image, ready to be imported."""
    archive = home / "busybox.tar"
    busybox.write_image(archive)
    return archive


STACKS = [
    pytest.param((release, protocol), id=f"{release.name}-{protocol}")
    for release in RELEASES
    for protocol in (["ttrpc", "grpc"] if release.name == "1.7" else ["ttrpc"])
]


@pytest.fixture(scope="session", params=STACKS)
def stack(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, image_archive: Path
) -> Iterator[Stack]:
    """Each containerd over each protocol that it can use."""
    release, protocol = request.param
    runtime = request.config.getoption("--runtime")
    if protocol == "grpc" and runtime != HAKO:
        pytest.skip("only Hako offers a choice of protocol")
    with _stack(
        home,
        nursery,
        image_archive,
        release=release,
        protocol=protocol,
        runtime=runtime,
        templates=_templates(request, release),
    ) as opened:
        yield opened


@pytest.fixture(scope="session")
def one_stack(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, image_archive: Path
) -> Iterator[Stack]:
    """The newest containerd over ttrpc, for tests that do not depend on containerd."""
    with _stack(
        home,
        nursery,
        image_archive,
        release=RELEASES[-1],
        protocol="ttrpc",
        runtime=request.config.getoption("--runtime"),
        templates=_templates(request, RELEASES[-1]),
        name="one",
    ) as opened:
        yield opened


FEW_FILES = 4000
EITHER = [
    pytest.param((release, runtime), id=f"{release.name}-{runtime.split('.')[2]}")
    for release in RELEASES[1:]
    for runtime in (RUNC, HAKO)
]


@pytest.fixture(scope="session", params=EITHER)
def either_stack(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, image_archive: Path
) -> Iterator[Stack]:
    """The two newest containerds, each with runc and with Hako: what runc does is the right behaviour."""
    release, runtime = request.param
    with _stack(
        home,
        nursery,
        image_archive,
        release=release,
        protocol="ttrpc",
        runtime=runtime,
        templates=request.getfixturevalue("templates") if runtime == HAKO else None,
        name=f"{release.name}-{runtime.split('.')[2]}",
    ) as opened:
        yield opened


@pytest.fixture(scope="session", params=[RUNC, HAKO], ids=["runc", "hako"])
def stack_of_few_files(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, image_archive: Path
) -> Iterator[Stack]:
    """The newest containerd with both runtimes, where no process may have more than some files open."""
    runtime = request.param
    limits = ("prlimit", f"--nofile={FEW_FILES}:{FEW_FILES}")
    with _stack(
        home,
        nursery,
        image_archive,
        release=RELEASES[-1],
        protocol="ttrpc",
        runtime=runtime,
        templates=request.getfixturevalue("templates") if runtime == HAKO else None,
        name=f"few-files-{runtime.split('.')[2]}",
        launcher=(*limits, "setpriv", "--bounding-set=-sys_resource"),
    ) as opened:
        yield opened


def _templates(request: pytest.FixtureRequest, release: Release) -> Path | None:
    """Find the templates of a stack's machines: those of one release boot cold."""
    if release.name == COLD_RELEASE or request.config.getoption("--runtime") != HAKO:
        return None
    found: Path = request.getfixturevalue("templates")
    return found


@contextlib.contextmanager
def _stack(
    home: Path,
    nursery: Nursery,
    image_archive: Path,
    *,
    release: Release,
    protocol: str,
    runtime: str,
    templates: Path | None,
    name: str | None = None,
    launcher: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    shim: str = "",
) -> Iterator[Stack]:
    place = home / (name or f"{release.name}-{protocol}")
    state_directory = home / f"{place.name}-hako"
    state_directory.mkdir(mode=0o700)
    config = write_config(
        home / f"{place.name}.toml",
        state_directory=state_directory,
        protocol=protocol,
        templates=templates,
        shim=shim,
    )
    daemon = Containerd(
        release=release,
        home=place,
        nursery=nursery,
        environment={"HAKO_CONFIG": str(config), **(environment or {})},
        runtime=runtime,
        launcher=launcher,
    )
    with running(daemon):
        imported = daemon.ctr("images", "import", image_archive)
        assert imported.code == 0, imported.stderr
        yield Stack(containerd=daemon, protocol=protocol, state_directory=state_directory, config=config)


def _counted(request: pytest.FixtureRequest) -> Stack | None:
    for name in ("stack", "one_stack", "either_stack", "stack_of_few_files"):
        if name in request.fixturenames:
            found = request.getfixturevalue(name)
            assert isinstance(found, Stack)
            return found
    return None


@contextlib.contextmanager
def _census(stack: Stack) -> Iterator[None]:
    before = census.take(stack.containerd, state_directory=stack.state_directory)
    yield
    stack.containerd.revive()
    changes = census.difference(before, stack.containerd, state_directory=stack.state_directory)
    if changes:
        for name in stack.containerd.containers():  # which would be in the way of all later tests
            if f"container {name}" not in before:
                stack.containerd.remove(name)
        pytest.fail("left behind (+) or lost (-):\n" + "\n".join(changes), pytrace=False)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare the machine before and after each test."""
    stack = _counted(request)
    if stack is None:
        yield
        return
    log = stack.containerd.log
    start = log.stat().st_size
    try:
        with _census(stack):
            yield
    finally:
        with log.open("rb") as opened:  # shown by pytest when the test failed
            opened.seek(start)
            print(opened.read().decode(errors="replace")[-20000:])


_numbers = itertools.count(1)


def new_id() -> str:
    """Return a container id that no other test uses."""
    return f"hako-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def container(stack: Stack) -> Iterator[str]:
    """An unused container id; the remains of a failed test under it are removed."""
    name = new_id()
    yield name
    if name in stack.containerd.containers():
        stack.containerd.remove(name)


@pytest.fixture(scope="module")
def long_lived(stack: Stack) -> Iterator[str]:
    """A detached container that the tests of a module share."""
    name = new_id()
    with _census(stack):
        started = stack.containerd.run(busybox.IMAGE, name, "sleep", "100000", options=["--detach"])
        try:
            assert started.code == 0, started.stderr
            yield name
        finally:
            stack.containerd.remove(name)
