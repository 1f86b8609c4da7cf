"""File systems that the host mounts for a container, in the shim's mount namespace, and shares as volumes.

Their directories and disks are opened like volumes, without following a link that a guest made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from shim.agent.oci_fields import refusing_malformed
from shim.agent.oci_mount_kinds import (
    FileSystem,
    Kind,
    describe,
    file_system_of,
    kind_of,
    split_layers,
    unescaped,
)
from shim.errors import Internal, InvalidArgument, ShimError
from shim.host import kernel, mounts
from shim.host.volume_source import found

if TYPE_CHECKING:
    from pathlib import Path

    from shim.host.volume_source import GuestWritable

log = logging.getLogger(__name__)

_OVERLAY = "overlay"
_LAYERS = "lowerdir"
_WRITTEN = "upperdir"
_DIRECTORIES = frozenset({_LAYERS, _WRITTEN, "workdir"})


class FileSystems:
    """The file systems that the host mounts for one container.

    :param directory: where they are mounted; made with the first one.
    :param writable: the directories in which guests may write.
    """

    def __init__(self, directory: Path, *, writable: GuestWritable) -> None:
        self._directory = directory
        self._writable = writable
        self._made = contextlib.ExitStack()

    async def mount(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Mount the file systems of a specification.

        :param spec: the decoded ``config.json``.
        :returns: the specification with binds in their place.
        :raises ShimError: if it is malformed, a mount's type is unknown, or the host refuses a mount.
        """
        with refusing_malformed("config.json"):
            entries = spec.get("mounts") or []
            wanted = {
                number: file_system_of(entry)
                for number, entry in enumerate(entries)
                if kind_of(entry) is Kind.HOST
            }
        if not wanted:
            return spec
        binds = {}
        for number, one in wanted.items():
            target = self._directory / str(number)
            await mounts.run_to_the_end(functools.partial(self._mount, one, target))
            binds[number] = {
                "destination": one.destination,
                "type": "bind",
                "source": str(target),
                "options": list(one.bind_options),
            }
        return {**spec, "mounts": [binds.get(number, entry) for number, entry in enumerate(entries)]}

    async def take_back(self) -> None:
        """Unmount them, in reverse order."""
        await mounts.run_to_the_end(self._made.close)

    def _mount(self, one: FileSystem, target: Path) -> None:
        if not self._directory.exists():
            self._directory.mkdir(parents=True, mode=0o700)
            self._made.callback(self._directory.rmdir)
        target.mkdir()
        self._made.callback(target.rmdir)
        with contextlib.ExitStack() as opened:
            try:
                source, data = self._opened(one, opened)
            except InvalidArgument as error:
                raise InvalidArgument(f"{describe(one)}: {str(error).removeprefix('mount: ')}") from error
            try:
                mounts.mount(source, target, one.fstype, mounts.parse_options(one.flags).flags, data)
            except ShimError as error:
                cause = str(error).rpartition(": ")[
                    2
                ]  # the error's own text would show descriptors instead of paths
                raise type(error)(f"{describe(one)}: {cause}; look at its source and options") from error
            self._made.callback(_unmount, target)

    def _opened(self, one: FileSystem, opened: contextlib.ExitStack) -> tuple[str, str]:
        """Open all that it is made of.

        :param opened: what keeps it open.
        :returns: the source and the data for mount(2), in which descriptors stand for paths.
        :raises InvalidArgument: if a part does not exist, or there are too many.
        """
        source = one.source
        if one.fstype != _OVERLAY and source.startswith("/"):
            source = self._open(source, opened)
        data = ",".join(self._opened_option(one, option, opened) for option in one.data)
        # mount(2) would truncate longer data.
        if len(data) >= os.sysconf("SC_PAGESIZE"):
            raise InvalidArgument(f"mount: {one.fstype}: {len(data)} bytes of options are more than a page")
        return source, data

    def _opened_option(self, one: FileSystem, option: str, opened: contextlib.ExitStack) -> str:
        name, equals, value = option.partition("=")
        if one.fstype != _OVERLAY:
            is_path = equals and value.startswith("/")
            return f"{name}={self._open(value, opened)}" if is_path else option
        if name not in _DIRECTORIES:
            return option
        layers = split_layers(value) if name == _LAYERS else [("", unescaped(value))]
        paths = "".join(
            f"{separator}{self._open(path, opened, is_written=name == _WRITTEN)}"
            for separator, path in layers
        )
        return f"{name}={paths}"

    def _open(self, path: str, opened: contextlib.ExitStack, *, is_written: bool = False) -> str:
        if not path.startswith("/"):
            raise InvalidArgument(f"mount: {path!r} is not an absolute path")
        descriptor = opened.enter_context(found(path, self._writable))
        if is_written:
            self._writable.add(descriptor)
        return f"/proc/self/fd/{descriptor}"


def _unmount(target: Path) -> None:
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A file system that is unmounted while it is in use may be written at any later time.
        kernel.sync_file_system(descriptor)
    except OSError as error:
        log.warning("mounts: %s: %s", target, error)
    finally:
        os.close(descriptor)
    try:
        mounts.unmount(target)
    except Internal as error:
        log.warning("%s", error)
