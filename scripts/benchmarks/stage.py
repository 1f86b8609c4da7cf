"""The stage of all measurements: a private containerd that runs containers under Hako and runc."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.taskstats import EndedThreads
from shim.config import HypervisorConfig
from tests.e2e import busybox, private
from tests.e2e.conftest import HAKO, write_config
from tests.e2e.containerd import CGROUPS, NAMESPACE, RELEASES, SHIM_DIRECTORY, Containerd, running
from tests.e2e.life import until
from tests.e2e.nursery import Nursery, descendants
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from tests.e2e.nursery import Process

RUNC = "io.containerd.runc.v2"
GONE_TIMEOUT_S = patient(60.0)
CROWD_TIMEOUT_S = patient(300.0)
"""Under KVM this is ten times as long, and a configuration allows boot_timeout_s no more than 3600."""
ZYGOTE = "-zygote"


class MeasurementError(Exception):
    """Something that should be measured did not work."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """What every measurement can use.

    :param home: a directory for files, with a path short enough for sockets.
    :param rounds: how often each comparison is repeated.
    :param hako: the containerd, whose runtime is Hako.
    :param state_directory: where Hako keeps the state of its sandboxes.
    :param config: Hako's configuration file.
    :param runner: the event loop for asynchronous code.
    :param ended: reports threads that end, while it is entered.
    """

    home: Path
    rounds: int
    hako: Containerd
    state_directory: Path
    config: Path
    runner: asyncio.Runner
    ended: EndedThreads
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def runc(self) -> Containerd:
        """The same containerd, whose runtime is runc."""
        return dataclasses.replace(self.hako, runtime=RUNC)

    def new_id(self) -> str:
        """Return a container id that was not used before."""
        return f"bench-{next(self._numbers)}"

    def configure(
        self, *, zygote: bool = True, template: bool = False, hypervisor: str = "", guest: str = ""
    ) -> None:
        """Configure how Hako makes later sandboxes.

        :param zygote: whether shims are forked from a warm process.
        :param template: whether machines are cloned from a template; if so, a missing template is built.
        :param hypervisor: other keys of that table of the configuration.
        :param guest: keys of that table.
        :raises MeasurementError: if the template cannot be built.
        """
        write_config(
            self.config,
            state_directory=self.state_directory,
            templates=Path(HypervisorConfig().template_dir) if template else None,
            shim=f"zygote = {str(zygote).lower()}\n",
            hypervisor=hypervisor,
            guest=guest,
        )
        if template:
            self.hako_command("template", "build")

    def hako_command(self, *words: str) -> str:
        """Run the operator's command ``hako`` with the configuration of the sandboxes.

        :returns: its standard output.
        :raises MeasurementError: if it fails.
        """
        done = subprocess.run(
            [SHIM_DIRECTORY / "hako", *words, "--config", self.config],
            capture_output=True,
            text=True,
            timeout=CROWD_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise MeasurementError(f"hako {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def processes(self) -> dict[int, Process]:
        """Return all processes that serve sandboxes and containers, which excludes the zygote."""
        return {
            process.pid: process
            for process in self.hako.nursery.descendants()
            if process.pid != self.hako.pid and ZYGOTE not in process.command
        }

    def wait_until_gone(self, *, but: Collection[int] = ()) -> None:
        """Wait until no process of a sandbox or container is left to disturb later measurements.

        :param but: ids of sandboxes that may stay.
        :raises TimeoutError: if a process of another one stays.
        """

        def gone() -> bool:
            return not self.processes().keys() - set(but)

        until(gone, what="the end of every process of a sandbox", timeout_s=GONE_TIMEOUT_S)

    def kill_everything(self) -> None:
        """End what a failed measurement has left, so that it does not disturb later ones.

        :raises TimeoutError: if a process stays.
        """
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_until_gone()

    def wait_for_zygote(self) -> None:
        """Wait until the zygote, which the first shim has started, has a spare fork.

        :raises TimeoutError: if it does not.
        """

        def serves() -> bool:
            zygotes = self.hako.nursery.zygotes(self.hako.address)
            return any(True for zygote in zygotes for _ in descendants(zygote.pid))

        until(serves, what="the zygote serves")

    def run_detached(self, daemon: Containerd, name: str) -> None:
        """Start a sleeping container.

        :param daemon: :attr:`hako` or :attr:`runc`.
        :param name: its id.
        :raises MeasurementError: if it does not start.
        """
        started = daemon.run(
            busybox.IMAGE, name, "sleep", "100000", options=["--detach"], timeout_s=CROWD_TIMEOUT_S
        )
        if started.code != 0:
            raise MeasurementError(f"ctr run: {name}: {started.stderr.strip()}")

    def time_run(self) -> float:
        """Time ``ctr run --rm`` of ``true`` under Hako, from ctr's spawn to its end, in seconds.

        :raises MeasurementError: if it fails.
        """
        name = self.new_id()
        began_s = time.perf_counter()
        done = self.hako.run(busybox.IMAGE, name, "true", options=["--rm"], timeout_s=CROWD_TIMEOUT_S)
        took_s = time.perf_counter() - began_s
        if done.code != 0:
            raise MeasurementError(f"ctr run: {name}: {done.stderr.strip()}")
        self.wait_until_gone()
        return took_s

    @contextlib.contextmanager
    def container(self) -> Iterator[str]:
        """Keep a sleeping container under Hako for a block."""
        name = self.new_id()
        self.run_detached(self.hako, name)
        try:
            yield name
        finally:
            self.hako.remove(name)
            self.wait_until_gone()


@contextlib.contextmanager
def _no_cgroups_left() -> Iterator[None]:
    """Remove the cgroups of containers that could not be ended in the usual way."""
    try:
        yield
    finally:
        for top in (CGROUPS / NAMESPACE, *CGROUPS.glob(f"*/{NAMESPACE}")):
            for directory, _, _ in os.walk(top, topdown=False):
                os.rmdir(directory)  # noqa: PTH106 - os.walk gives strings


@contextlib.contextmanager
def opened(*, rounds: int) -> Iterator[Stage]:
    """Make the stage for a block, and remove it afterwards.

    :param rounds: how often each comparison is repeated.
    """
    ended = EndedThreads()
    private.enter()
    with (
        _no_cgroups_left(),
        tempfile.TemporaryDirectory(prefix="hako-bench-") as directory,
        asyncio.Runner() as runner,
        Nursery() as nursery,
    ):
        home = Path(directory)
        state_directory = home / "hako"
        state_directory.mkdir(mode=0o700)
        config = home / "config.toml"
        daemon = Containerd(
            release=RELEASES[0],
            home=home / "containerd",
            nursery=nursery,
            environment={"HAKO_CONFIG": str(config)},
            runtime=HAKO,
        )
        with running(daemon):
            archive = home / "busybox.tar"
            busybox.write_image(archive)
            imported = daemon.ctr("images", "import", archive)
            if imported.code != 0:
                raise MeasurementError(f"ctr images import: {imported.stderr.strip()}")
            stage = Stage(
                home=home,
                rounds=rounds,
                hako=daemon,
                state_directory=state_directory,
                config=config,
                runner=runner,
                ended=ended,
            )
            stage.configure()
            yield stage
