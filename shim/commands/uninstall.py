"""``hako uninstall``: remove what ``hako install`` and sandboxes have left on this host."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import config, zygote_protocol
from shim.commands import docker, drop_in, install
from shim.commands.remedies import remedy
from shim.commands.steps import Steps
from shim.host import releases, state_directory
from shim.host.ledger import Ledger
from shim.machine.template_store import TemplateStore
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse

    from shim.config import Config

_UNDO_TIMEOUT_S = 10.0
_CACHE = Path("/var/cache/hako")


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("uninstall", help="undo `hako install`")
    parser.add_argument(
        "--print", action="store_true", help="print what would be removed, and change nothing"
    )
    parser.add_argument(
        "--keep-sandboxes", action="store_true", help="let running sandboxes run to their end"
    )
    parser.add_argument("--keep-image", action="store_true", help="keep the guest's image and its packages")
    parser.add_argument(
        "--containerd-config",
        type=Path,
        default=drop_in.MAIN,
        metavar="FILE",
        help=f"containerd's main file ({drop_in.MAIN})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")


def run(chosen: argparse.Namespace) -> int:
    """Remove everything, and print one line for each thing.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if a sandbox runs, or something cannot be removed.
    """
    environment = {config.ENVIRONMENT_VARIABLE: chosen.config} if chosen.config else os.environ
    settings = config.parse(config.locate(environment))
    state = Path(settings.shim.state_dir)
    running, ended = _found(state)
    if running and not chosen.keep_sandboxes:
        raise Refusal(f"uninstall: sandboxes run: {_names(running)}; stop them first, or --keep-sandboxes")
    # A running guest still loads modules from there.
    keeps_image = chosen.keep_image or bool(running)
    image = [] if keeps_image else [Path(settings.guest.kernel).parent, _CACHE]
    steps = Steps(as_json=chosen.json)
    if chosen.print:
        _say(steps, settings, chosen.containerd_config, ended=ended, image=image)
        steps.end()
        return 0
    for directory in ended:
        _undo(directory, steps)
    for line in filter(None, (install.remove(chosen.containerd_config), docker.left())):
        steps.say(line)
    try:
        _end_zygotes()
        TemplateStore(Path(settings.hypervisor.template_dir)).remove("")
        for path in (Path(settings.hypervisor.template_dir), *image):
            if path.exists():
                shutil.rmtree(path)
                steps.say(f"removed: {path}")
    except OSError as error:
        rest = remedy(error, "remove it by hand")
        raise Refusal(f"uninstall: {error.filename}: {error.strerror}; {rest}") from error
    if running:
        steps.say(f"left to their end: {_names(running)}; stop them before containerd is restarted")
        if not chosen.keep_image:
            kept = Path(settings.guest.kernel).parent
            steps.say(f"left: {kept}: running guests use it; run `hako uninstall` again after their end")
        steps.end()
        return 0
    releases.remove_shared()
    with contextlib.suppress(OSError):  # something else is there
        state.rmdir()
    steps.end()
    return 0


def _say(steps: Steps, settings: Config, main: Path, *, ended: list[Path], image: list[Path]) -> None:
    paths = [main.parent / drop_in.NAME, Path(settings.hypervisor.template_dir), *ended, *image]
    for path in paths:
        if path.exists():
            steps.say(f"would remove: {path}")


def _found(state: Path) -> tuple[list[state_directory.StartRecord], list[Path]]:
    """Return the sandboxes that run, and the state directories that others left behind."""
    paths = sorted(path.parent for path in state.glob("*/sandbox.json"))
    running = {path: record for path in paths if (record := _running(path)) is not None}
    return list(running.values()), [path for path in paths if path not in running]


def _names(running: list[state_directory.StartRecord]) -> str:
    return ", ".join(f"{each.id} of namespace {each.namespace}" for each in running)


def _running(directory: Path) -> state_directory.StartRecord | None:
    try:
        record = state_directory.read_record(str(directory))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # noqa: FBT003 - its only spelling
            probe.connect(record.socket_path)  # which never waits: unix(7)
    except BlockingIOError:  # it has many callers already: it is slow or stopped, but has not ended
        return record
    except (OSError, ValueError, TypeError):
        return None
    return record


def _undo(directory: Path, steps: Steps) -> None:
    held = state_directory.lock_existing(str(directory), wait=False)
    if held is None:
        return
    try:
        ledger = Ledger(str(directory))
        failures = ledger.undo_all(deadline_s=_UNDO_TIMEOUT_S)
        ledger.close()
    except OSError as error:
        raise Refusal(
            f"uninstall: {directory}: {error.strerror}; {remedy(error, 'remove it by hand')}"
        ) from error
    finally:
        os.close(held)
    if failures:
        raise Refusal(f"uninstall: {failures[0]}")
    steps.say(f"removed: {directory}")


def _end_zygotes() -> None:
    """End the zygotes of an installed package; those of a source tree end by themselves."""
    root = releases.root()
    if root is not None:
        releases.retire_zygotes(root, also_current=True)
    releases.remove_dead_sockets(zygote_protocol.ZYGOTE_DIRECTORY)
