"""Builds the template of a configuration: at the operator's request, or in a background process.

The background process belongs to no sandbox: it inherits no descriptor of the shim that started it, and runs
in the mount namespace and the cgroup from which that shim was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import HypervisorError, JailError, save_template, template_key
from shim.errors import Internal
from shim.host import daemonize
from shim.host.ledger import Ledger
from shim.machine.bounds import bounded
from shim.machine.host_choice import resolve
from shim.machine.jail import Jail, refuse_unbounded, without
from shim.machine.sizing import plan
from shim.machine.spec import describe
from shim.machine.template_store import remove_remains
from shim.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor import VmSpec
    from shim.config import Config
    from shim.machine.template_store import Building, Template, TemplateStore

log = logging.getLogger(__name__)

NICENESS = 19
START_TIMEOUT_S = 10.0
_BOOT_TIMES = 4  # how many times longer than a boot a low-priority process on a busy host may take
_GRACE_S = 10
_FIRST_TO_GO = 1000  # proc(5): the most that oom_score_adj can be
_SANDBOXES_OWN = {
    "name",
    "directory",
    "share_source",
    "virtiofsd",
    "vsock_daemon",
    "network_namespace",
    "jail",
    "template",
}


def longest_s(config: Config) -> float:
    """Return how long a build may take, in seconds.

    :param config: how long a boot may take.
    """
    return _BOOT_TIMES * config.guest.boot_timeout_s + _GRACE_S


def build(config: Config, store: TemplateStore, *, wait_s: float) -> Template:
    """Make the template for machines of the configured size, unless there is one.

    :param config: the operator's.
    :param store: where it goes.
    :param wait_s: how long to wait until others have built theirs, in seconds.
    :returns: the template.
    :raises ShimError: if the host lacks something, or the machine does not start or cannot be saved.
    :raises Refusal: if another process builds for too long, the store cannot be trusted, or machines of this
        configuration are not cloned.
    :raises OSError: if the store cannot be written.
    """
    if config.hypervisor.huge_pages:
        raise Refusal(
            "template: [hypervisor] huge_pages: such machines are not cloned; switch it off, or build none"
        )
    with store.building(wait_s=wait_s) as building, _guarding(building):
        return asyncio.run(_build(config, store, building.place))


async def _build(config: Config, store: TemplateStore, place: Path) -> Template:
    sizes = plan(config.hypervisor)
    running, built = place / "machine", place / "template"
    for directory in (running, built):
        directory.mkdir(mode=0o700)
    spec = describe(
        config,
        await resolve(config),
        name="template",
        directory=running,
        share=running,
        size=sizes.boot,
        most=sizes.most,
    )
    try:
        key = template_key(spec)
        found = store.find(key)
        if found is not None:
            return found
        try:
            await _save(config, spec, built)
        except HypervisorError as error:
            store.fail(key, str(error))
            raise
    except HypervisorError as error:
        raise Internal(f"template: {error}") from error
    return store.publish(key, built, purpose=purpose_of(spec))


async def _save(config: Config, spec: VmSpec, directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        ledger = Ledger(str(directory.parent), create=True)
        stack.callback(ledger.close)
        jail = Jail.of(config, spec.accelerator)
        if jail is not None:
            stack.callback(jail.close)
        name = f"hako-template-{os.getpid()}"
        cgroup = bounded(spec, jail, wanted="", name=name, ledger=ledger)

        def record(name: str, pid: int) -> None:
            ledger.process(pid, name=name)
            cgroup.add(pid)
            refuse_unbounded(cgroup.problem, jail)

        save = partial(
            save_template,
            directory=directory,
            timeout_s=_BOOT_TIMES * config.guest.boot_timeout_s,
            on_process=record,
        )
        confined = dataclasses.replace(spec, jail=jail.identity if jail is not None else None)
        try:
            await save(confined)
        except JailError as error:
            await save(without(confined, str(error), jail))


def purpose_of(spec: VmSpec) -> dict[str, object]:
    """Describe the request: the settings of the machine, not the contents of its files."""
    settings = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return {
        name: value if isinstance(value, int) else " ".join(value) if isinstance(value, tuple) else str(value)
        for name, value in ((name, getattr(value, "value", value)) for name, value in settings.items())
        if name not in _SANDBOXES_OWN
    }


async def start_unless_building(
    config_text: str, store: TemplateStore, *, mount_namespace: int | None
) -> None:
    """Like :func:`start`, unless one is being built; a failure is logged."""
    try:
        if store.is_building():  # another machine started at the same time
            return
        await start(config_text, store, mount_namespace=mount_namespace)
    except (Refusal, OSError, TimeoutError) as error:
        log.warning("template: its builder cannot be started: %s", error)
    else:
        log.info("template: is built in the background")


async def start(config_text: str, store: TemplateStore, *, mount_namespace: int | None) -> None:
    """Let the template be made in the background.

    :param config_text: the text of the configuration.
    :param store: where it goes; failures are written to the store's log.
    :param mount_namespace: where the process runs, open; None is this process's own.
    :raises Refusal: if the store cannot be trusted.
    :raises OSError: if it cannot be started.
    :raises TimeoutError: if it does not get started in time.
    """
    entering = (
        [] if mount_namespace is None else ["nsenter", f"--mount=/proc/self/fd/{mount_namespace}", "--"]
    )
    output = store.open_log()
    # A file, not a pipe: when the builder reads it, its starter and maybe this process have ended.
    settings = os.memfd_create("config", os.MFD_CLOEXEC)
    try:
        os.write(settings, config_text.encode())
        os.lseek(settings, 0, os.SEEK_SET)
        starter = await asyncio.create_subprocess_exec(
            *entering,
            *("setsid", "--fork", "nice", f"--adjustment={NICENESS}"),
            *(sys.executable, "-P", "-m", "shim.cli", "template", "build", "--background", "--config", "-"),
            stdin=settings,
            stdout=output,
            stderr=output,
            cwd="/",
            env=daemonize.environment(),
            pass_fds=[] if mount_namespace is None else [mount_namespace],
        )
    finally:
        os.close(settings)
        os.close(output)
    async with asyncio.timeout(START_TIMEOUT_S):
        await starter.wait()


def go_to_the_background(config: Config) -> None:
    """Turn this process into a background one: no inherited descriptors, first to be killed, with a deadline.

    :param config: its deadline follows from how long a boot may take.
    """
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_FIRST_TO_GO), encoding="ascii")
    signal.alarm(math.ceil(longest_s(config)))


@contextlib.contextmanager
def _guarding(building: Building) -> Iterator[None]:
    """Let the directory of a build be removed, even if this process is killed.

    A guard process waits for the end of this one, and holds the lock until it has removed the directory. If
    both are killed at once, the next build removes it.
    """
    watched, held = os.pipe2(os.O_CLOEXEC)
    guard = os.fork()
    if guard == 0:
        try:
            _guard(building, watched)
        finally:
            os._exit(0)
    os.close(watched)
    try:
        yield
    finally:
        os.close(held)
        os.waitpid(guard, 0)


def _guard(building: Building, watched: int) -> None:
    os.setsid()
    kept = sorted((watched, building.lock))
    os.closerange(0, kept[0])
    os.closerange(kept[0] + 1, kept[1])
    os.closerange(kept[1] + 1, os.sysconf("SC_OPEN_MAX"))
    os.read(watched, 1)  # returns when the other end is closed, because no byte is ever written
    remove_remains(building.place)
