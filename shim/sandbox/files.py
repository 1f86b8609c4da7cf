"""The host's files that one container gets, through the share or as disks of the machine.

Everything is undone in reverse order, after the container was removed from the guest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor import Disk, DiskLimits, HostPciDevice, HypervisorError
from proto.kata import agent_pb2
from shim.agent.guest_names import agent_id, rootfs_of
from shim.agent.oci_disks import limits_of, without_limits_of
from shim.agent.oci_mount_kinds import OfTheGuest
from shim.agent.oci_vfio import devices_of
from shim.errors import Internal, InvalidArgument, Unimplemented
from shim.host import mounts, named_files
from shim.host.answering import all_answer
from shim.host.volume_source import opened
from shim.volumes import huge_pages
from shim.volumes.bind_mounts import Shown, Volumes
from shim.volumes.file_systems import FileSystems

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor import Hypervisor
    from proto.containerd.types_pb2 import Mount
    from shim.agent.client import Agent
    from shim.agent.oci import Translation
    from shim.agent.oci_disks import DiskDevice, RootDisk
    from shim.volumes.followed_volumes import FollowedVolumes
    from shim.volumes.shared_entries import SharedEntries

log = logging.getLogger(__name__)

_SYSFS = Path("/sys")
UNPLUG_TIMEOUT_S = (
    5.0  # below containerd's 10 s for the end of a task; a guest releases a disk in milliseconds
)


@dataclass(slots=True, kw_only=True)
class _Plugged:
    """A disk in the machine.

    :param path: its path on the host.
    :param number: its major and minor number on the host; None for a file.
    :param mount_point: where the guest mounts it; empty if the container does.
    :param size_bytes: its last known size.
    """

    vm: Hypervisor
    path: Path
    number: tuple[int, int] | None
    mount_point: str
    size_bytes: int


class ContainerFiles:
    """The files of one container.

    :param container_id: the container's id.
    :param bundle: its bundle directory.
    :param entries: the host's files in the guest, beside root file systems.
    :param followed: the volumes that follow the host's mounts.
    """

    def __init__(
        self, container_id: str, *, bundle: Path, entries: SharedEntries, followed: FollowedVolumes
    ) -> None:
        self._id = container_id
        self._bundle = bundle
        self._entries = entries
        self._followed = followed
        self._volumes: Volumes | None = None
        mounted = entries.share.parent / "mounts" / container_id
        self._file_systems = FileSystems(mounted, writable=entries.writable)
        self._shown = contextlib.ExitStack()
        self._plugged: dict[str, _Plugged] = {}
        self._pci_devices: dict[str, Hypervisor] = {}
        self._storages: list[agent_pb2.Storage] = []
        self._devices: list[agent_pb2.Device] = []

    @property
    def has_disks(self) -> bool:
        """Whether it has disks; the guest writes their data back when the container is removed."""
        return bool(self._plugged)

    def announce(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Add the mounts and disks to the request that creates the container."""
        request.storages.extend(self._storages)
        request.devices.extend(self._devices)

    def show_root(self, spec: dict[str, Any], rootfs: Iterable[Mount]) -> None:
        """Show the root file system.

        :param spec: the decoded ``config.json``.
        :param rootfs: containerd's mounts; if there are none, the specification names a directory.
        :raises ShimError: if it cannot be mounted.
        """
        source = self._bundle / "rootfs"
        if rootfs:
            source.mkdir(mode=0o711, exist_ok=True)
            self._entries.disregard(source)
            mounts.mount_all(rootfs, source)
            self._shown.callback(mounts.unmount, source)
        else:
            root = spec.get("root") or {}
            path = root.get("path") or "rootfs" if isinstance(root, dict) else None
            if not isinstance(path, str):
                raise InvalidArgument(
                    f"rootfs: container {self._id}: root.path of config.json is not a string"
                )
            source = self._bundle / path
            if not os.path.isdir(source):  # noqa: PTH112 - pathlib raises for impossible paths
                raise InvalidArgument(f"rootfs: container {self._id}: {source} is not a directory")
        self._bind_into_share(source, f"{agent_id(self._id)}/rootfs")

    async def mount(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Let the host mount what only it can mount, see :meth:`FileSystems.mount`, and the guest the rest.

        :param spec: the decoded ``config.json``, in which some mounts may already be the guest's.
        :raises ShimError: if that cannot be done.
        """
        spec = await self._file_systems.mount(spec)
        for entry in spec.get("mounts") or []:
            if isinstance(entry, OfTheGuest) and entry.part_of:
                self._storages.append(
                    agent_pb2.Storage(
                        driver="bind",
                        source=entry.part_of,
                        fstype="bind",
                        mount_point=entry["source"],
                        options=["bind"],
                    )
                )
        return spec

    async def show_volumes(self, translation: Translation, *, agent: Agent) -> None:
        """Share the volumes, and write their paths in the guest into the specification.

        :raises ShimError: if one cannot be shared or mounted.
        """
        shown = Shown(storages=self._storages)
        self._volumes = Volumes(self._entries, self._followed, agent=agent, shown=shown)
        for mount, shared in zip(translation.spec.Mounts, translation.shared_mounts, strict=True):
            if shared is None:
                shown.mounts.append(mount)
                continue
            path = self._bundle / shared.source
            huge = huge_pages.volume(path, shared, translation.spec, inherits_group=agent.is_hako)
            if huge is not None:
                shown.mounts.append(huge[0])
                shown.storages.append(huge[1])
                continue
            await self._volumes.show(shared, bundle=self._bundle)
        del translation.spec.Mounts[:]
        translation.spec.Mounts.extend(shown.mounts)
        if shown.is_slave:
            # runc's root is a slave by default, crun's is private.
            linux = translation.spec.Linux
            linux.RootfsPropagation = linux.RootfsPropagation or "rslave"

    async def plug_root(self, disk: RootDisk, *, vm: Hypervisor) -> None:
        """Give the machine the disk with the root file system.

        :raises Internal: if it cannot be plugged.
        """
        mount_point = rootfs_of(agent_id(self._id))
        address = await self._plug(
            disk.path,
            read_only=disk.read_only,
            limits=DiskLimits(),
            mount_point=mount_point,
            number=None,
            vm=vm,
        )
        self._storages.append(
            agent_pb2.Storage(
                driver="blk",
                source=address,
                fstype=disk.fstype,
                options=disk.options,
                mount_point=mount_point,
            )
        )

    async def plug(self, device: DiskDevice, *, vm: Hypervisor) -> None:
        """Give the machine a disk that the container uses as a device.

        :raises InvalidArgument: if the host has no such device.
        :raises Internal: if it cannot be plugged.
        """
        try:
            path = device.path()
        except OSError as error:
            raise InvalidArgument(
                f"spec: linux.devices: {device.container_path}: the host has no block device "
                f"{device.major}:{device.minor}; name one that it has"
            ) from error
        address = await self._plug(
            path,
            read_only=device.read_only,
            limits=device.limits,
            mount_point="",
            number=(device.major, device.minor),
            vm=vm,
        )
        self._devices.append(
            agent_pb2.Device(
                id=address, type="blk", vm_path="", container_path=device.container_path, options=[]
            )
        )

    async def plug_group(self, group: int, *, vm: Hypervisor) -> None:
        """Give the machine the PCI devices of a VFIO group.

        :param group: its number.
        :param vm: the machine.
        :raises InvalidArgument: if the host has no such group.
        :raises Internal: if a device cannot be plugged.
        """
        places = []
        for address in devices_of(group, sysfs=_SYSFS):
            device_id = f"pci-{uuid.uuid4().hex[:12]}"
            try:
                path = await vm.plug_pci(HostPciDevice(id=device_id, address=address))
            except HypervisorError as error:
                raise Internal(f"create: container {self._id}: {error}") from error
            self._pci_devices[device_id] = vm
            places.append(f"{address}={path}")
        # The guest's kernel drives them, and its agent gives the container the drivers' device nodes.
        self._devices.append(
            agent_pb2.Device(
                id=f"vfio{group}", type="vfio-pci-gk", container_path=f"/dev/vfio/{group}", options=places
            )
        )

    def without_disk_limits(self, resources: dict[str, Any]) -> dict[str, Any]:
        """Remove the rates of the container's own disks from its limits; the machine enforces them."""
        return without_limits_of(resources, [each.number for each in self._plugged.values() if each.number])

    async def limit_disks(self, resources: dict[str, Any]) -> None:
        """Change how fast the container's disks may be used.

        :param resources: as ``linux.resources`` of an OCI specification.
        :raises Internal: if the machine refuses.
        """
        if not resources.get("blockIO"):
            return
        for device_id, plugged in self._plugged.items():
            if plugged.number is not None:
                try:
                    await plugged.vm.limit_disk(device_id, limits_of(resources, plugged.number))
                except HypervisorError as error:
                    raise Internal(f"update: container {self._id}: {error}") from error

    async def follow_sizes(self, agent: Agent) -> None:
        """Let disks that have grown on the host grow in the guest, with the file systems on them.

        :raises Internal: if the machine refuses.
        :raises ShimError: if the guest refuses.
        """
        if self._plugged:
            paths = [str(plugged.path) for plugged in self._plugged.values()]
            await all_answer(paths, phase=f"update: container {self._id}")
        for device_id, plugged in self._plugged.items():
            if _size_of(plugged.path) == plugged.size_bytes:
                continue
            try:
                size_bytes = await plugged.vm.resize_disk(device_id)
            except HypervisorError as error:
                raise Internal(f"update: container {self._id}: {error}") from error
            if plugged.mount_point:
                try:
                    await agent.files.resize_volume(plugged.mount_point, size_bytes=size_bytes)
                except Unimplemented as error:  # a stock agent
                    log.warning("update: container %s: %s stays as it is: %s", self._id, plugged.path, error)
            plugged.size_bytes = size_bytes  # only now, so that after a failure the next update tries again

    async def take_back(self) -> None:
        """Unplug and unmount everything; the guest keeps a disk that it does not release."""
        while self._plugged:
            device_id, plugged = self._plugged.popitem()
            try:
                await plugged.vm.unplug(device_id, timeout_s=UNPLUG_TIMEOUT_S)
            except HypervisorError as error:
                log.warning("delete: container %s: %s: %s", self._id, plugged.path, error)
        while self._pci_devices:
            device_id, vm = self._pci_devices.popitem()
            try:
                await vm.unplug(device_id, timeout_s=UNPLUG_TIMEOUT_S)
            except HypervisorError as error:
                log.warning("delete: container %s: %s", self._id, error)
        if self._volumes is not None:
            await self._volumes.take_back()
        await mounts.run_to_the_end(self._shown.close)
        await self._file_systems.take_back()

    async def _plug(
        self,
        path: Path,
        *,
        read_only: bool,
        limits: DiskLimits,
        mount_point: str,
        number: tuple[int, int] | None,
        vm: Hypervisor,
    ) -> str:
        device_id = f"disk-{uuid.uuid4().hex[:12]}"
        try:
            size_bytes = _size_of(path)
        except OSError as error:
            raise InvalidArgument(f"create: container {self._id}: {path}: {error.strerror}") from error
        try:
            address = await vm.plug_disk(
                Disk(
                    id=device_id,
                    path=path,
                    serial=device_id,
                    read_only=read_only,
                    discard=not read_only,
                    limits=limits,
                )
            )
        except HypervisorError as error:
            raise Internal(f"create: container {self._id}: {error}") from error
        self._plugged[device_id] = _Plugged(
            vm=vm, path=path, number=number, mount_point=mount_point, size_bytes=size_bytes
        )
        return address

    def _bind_into_share(self, source: Path, name: str) -> None:
        target = self._entries.share / name
        with opened(source, self._entries.writable) as descriptor:
            self._entries.writable.add(descriptor)
            target.parent.mkdir(mode=0o711)
            self._shown.callback(target.parent.rmdir)
            target.mkdir()
            self._shown.callback(target.rmdir)
            mounts.bind_opened(
                descriptor,
                target,
                read_only=False,
                read_only_below=False,
                recursive=True,
                follows=False,
                what=f"bind {source} on {target}",
            )
            self._shown.callback(mounts.unmount, target)


def _size_of(path: Path) -> int:
    with os.fdopen(named_files.open_regular(str(path), or_disk=True), "rb") as file:
        return file.seek(0, os.SEEK_END)
