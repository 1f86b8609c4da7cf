"""``delete``: leave nothing of a container on the host, even if everything else is dead."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from shim import config
from shim.bootstrap import grouping, wire
from shim.host import host_process, named_files, spec_file, state_directory
from shim.host.ledger import Ledger, shims_in
from shim.identifiers import check_identifier
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.bootstrap.command_line import CommandLine

#: How long a shim without containers may take to end before it is killed.
_GRACE_S = 2.0
_KILL_TIMEOUT_S = 2.0
#: For all hooks together: containerd gives this command 5 s, of which undoing rarely takes one.
_HOOKS_TIMEOUT_S = 3.0


def delete(line: CommandLine) -> bytes:
    """Undo the remains of a container, and of its sandbox if no other container needs it.

    containerd runs this at the end of every task, and when a shim's connection breaks. A sandbox whose shim
    runs and has other containers is left alone.

    :param line: flags as containerd gives them.
    :returns: a ``DeleteResponse`` for standard output.
    :raises Refusal: if something could not be undone; the next run continues there.
    """
    check_identifier(line.id, phase="delete", what="id")
    bundle = line.bundle or _working_directory()
    directory = state_directory.pointed_to(bundle) or _expected_directory(line, bundle)
    was_deserted = _is_on_record(directory, line.id)
    if was_deserted and _has_died(directory):
        from shim.bootstrap import failures  # noqa: PLC0415 - shims rarely die

        failures.died(directory)
    try:
        _delete_from(directory, line.id)
    finally:
        if was_deserted:
            _run_hooks(bundle, line.id)
    return wire.encode_delete_response(exit_status=host_process.STATUS_KILLED, exited_at=time.time())


def _working_directory() -> str:
    """Return the directory in which containerd runs this; empty if it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _expected_directory(line: CommandLine, bundle: str) -> str:
    """Compute the state directory as ``start`` did, for a bundle without a link to it."""
    try:
        group = grouping.group_of(bundle, line.id)
    except Refusal:
        group = line.id
    try:
        settings = config.parse(config.locate(os.environ)).shim
    except Refusal:
        settings = config.ShimConfig()
    name = grouping.socket_name(address=line.address, namespace=line.namespace, group=group)
    expected = state_directory.path_of(settings.state_dir, name)
    return expected if os.path.exists(expected) else _found_directory(settings.state_dir, line) or expected


def _found_directory(state_dir: str, line: CommandLine) -> str | None:
    """Look for the sandbox of a container whose bundle is gone, and with it the name of its pod."""
    with contextlib.suppress(OSError):
        for name in os.listdir(state_dir):
            directory = os.path.join(state_dir, name)
            with contextlib.suppress(OSError, ValueError, TypeError):  # not a sandbox's, or already removed
                record = state_directory.read_record(directory)
                caller = (line.namespace, line.address.removeprefix("unix://"))
                if (record.namespace, record.grpc_address) == caller and _is_on_record(directory, line.id):
                    return directory
    return None


def _is_on_record(directory: str, container: str) -> bool:
    """Tell whether a container was never deleted, because its shim died first."""
    try:
        ledger = Ledger(directory)
    except FileNotFoundError:
        return False
    try:
        return container in ledger.containers()
    finally:
        ledger.close()


def _has_died(directory: str) -> bool:
    """Tell whether the sandbox's shim ended without leaving its sandbox in order."""
    try:
        shims = shims_in(directory)
    except OSError:
        return False
    return bool(shims) and not any(map(host_process.is_running, shims))


def _run_hooks(bundle: str, container: str) -> None:
    """Run the container's poststop hooks, as its shim would have done."""
    try:
        if b'"poststop"' not in named_files.read_regular(spec_file.path_in(bundle)):
            return
    except OSError:
        return
    import asyncio  # noqa: PLC0415 - together a third of a second, which few deletions need
    from pathlib import Path  # noqa: PLC0415

    from shim.errors import InvalidArgument  # noqa: PLC0415
    from shim.sandbox.bundle import read_spec  # noqa: PLC0415
    from shim.sandbox.hooks import Hooks  # noqa: PLC0415

    try:
        hooks = Hooks(container, bundle=Path(bundle), spec=read_spec(Path(bundle)))
    except InvalidArgument:  # then no container of it has ever run
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(hooks.clean_up(), _HOOKS_TIMEOUT_S))


def _delete_from(directory: str, container: str) -> None:
    try:
        ledger = Ledger(directory)
    except FileNotFoundError:
        _remove_if_empty(directory)
        return
    try:
        ledger.deleted(container)
        if not _is_needed(ledger):
            _undo(directory, ledger)
    finally:
        ledger.close()


def _remove_if_empty(directory: str) -> None:
    """Remove the leftovers of a ``start`` that was killed between its first two steps."""
    lock = state_directory.lock_existing(directory)
    if lock is not None:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        os.close(lock)


def _is_needed(ledger: Ledger) -> bool:
    """Tell whether the shim runs and has other containers; give an idle one time to end."""
    shims = ledger.shims()
    if ledger.containers():
        return any(host_process.is_running(shim) for shim in shims)
    # Without the lock, because a shim that ends takes it to undo its work.
    host_process.end(shims, number=signal.SIGTERM, timeout_s=_GRACE_S)
    return False


def _undo(directory: str, ledger: Ledger) -> None:
    lock = state_directory.lock_existing(directory)
    if lock is None:
        return
    try:
        failures = ledger.undo_all(deadline_s=_KILL_TIMEOUT_S)
    finally:
        os.close(lock)
    if failures:
        raise Refusal(f"delete: {failures[0]}")
