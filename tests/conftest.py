"""Lanes: ``pytest -n 2`` runs the tests in two processes at once.

Each lane has its own copy of the machine's state (``private_machine`` of ``tests/e2e``), or waits for its
turn.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import host_settings
from tests.e2e import private
from tests.e2e.conftest import DEFAULT_BOOT_S
from tests.e2e.containerd import RELEASES, SHIM_DIRECTORY
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Generator

STACK = re.compile(r"\[(\d+\.\d+-[a-z]+)")
BUILD_TIMEOUT_S = patient(200.0)
TURNS = pytest.StashKey["Turns"]()


class ByFileAndStack(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives a lane the tests of one file on one stack at a time, in pytest's order.

    So the fixtures of a module are made once, and each lane goes from stack to stack once. The files of
    ``tests/cri`` share their pods, too.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        stack = STACK.search(test)
        place = "tests/cri" if file.startswith("tests/cri/") else file
        return f"{place} {stack[1] if stack else ''}"


class Turns:
    """Decides when a lane may run a test: beside the others, or alone.

    A test that must run alone holds the door until the room is empty, so that no other test enters before it.

    :param directory: one that all lanes know.
    """

    def __init__(self, directory: Path) -> None:
        self._door: IO[str] = (directory / "door").open("w")
        self._room: IO[str] = (directory / "room").open("w")
        self._alone = False

    def enter(self, *, alone: bool) -> None:
        """Wait until a test may run."""
        if self._alone and alone:
            return
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self._alone = alone

    def leave(self) -> None:
        """Let the other lanes run their tests."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self._alone = False

    def close(self) -> None:
        """Stop taking part."""
        self._door.close()
        self._room.close()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFileAndStack:
    """Say which tests go to which lane."""
    config.option.loadscopereorder = False
    return ByFileAndStack(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks of all directories, and join the other lanes if this process is one."""
    config.addinivalue_line("markers", "inherent(ID): runc passes, Hako cannot; docs/limits.md has a row ID")
    config.addinivalue_line("markers", "each_release: runs beside runc on each containerd by day, too")
    config.addinivalue_line(
        "markers", "alone: measures how long something takes, or needs every processor; the other lanes wait"
    )
    if hasattr(config, "workerinput"):
        config.stash[TURNS] = Turns(Path(config.option.basetemp).parent)


@pytest.hookimpl(tryfirst=True)  # before nightly tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that only runc can pass and nightly tests, and prolong timeouts on a slow host."""
    for item in items:
        if _is_for_the_night(item):
            item.add_marker(pytest.mark.nightly)
        longest = item.get_closest_marker("timeout")
        if longest:
            item.add_marker(pytest.mark.timeout(patient(longest.args[0])), append=False)
        limit = item.get_closest_marker("inherent")
        if limit and isinstance(item, pytest.Function) and "-hako" in item.callspec.id:
            reason = f"docs/limits.md: {limit.args[0]}"
            item.add_marker(pytest.mark.xfail(raises=AssertionError, strict=True, reason=reason))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the other lanes."""
    if TURNS in config.stash:
        config.stash[TURNS].close()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that no test's timeout runs while it waits for its turn
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    """Run a test when it is its turn."""
    turns = item.config.stash.get(TURNS, None)
    if turns is None:
        return (yield)
    turns.enter(alone=_alone(item))
    try:
        return (yield)
    finally:
        if not (_alone(item) and nextitem and _alone(nextitem)):
            turns.leave()


@pytest.fixture(scope="session")
def templates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the template of the default configuration, built by the first lane that needs it."""
    place = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        place = place.parent
    store, config = place / "templates", place / "templates.toml"
    if host_settings.INITRD:
        return store  # nobody uses it
    guest = f"[guest]\nboot_timeout_s = {patient(DEFAULT_BOOT_S):.0f}\n"
    table = host_settings.hypervisor_table(f'template_dir = "{store}"\n')
    config.write_text(f"[hypervisor]\n{table}{guest}", encoding="utf-8")
    argv = [str(SHIM_DIRECTORY / "hako"), "template", "build", "--config", str(config)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=BUILD_TIMEOUT_S)
    return store


@pytest.fixture(scope="session")
def private_machine() -> None:
    """From now on, give the tests of this lane their own mounts and network."""
    private.enter()


def _alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def _is_for_the_night(item: pytest.Item) -> bool:
    """Tell whether a test compares Hako with runc on a containerd that is not the newest."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker("each_release"):
        return False
    if "either_stack" not in item.fixturenames:
        return False
    stack = STACK.search(item.name)
    return stack is not None and not stack[1].startswith(f"{RELEASES[-1].name}-")
