"""The sandbox: namespaces that its containers share, storages, and the containers themselves."""

from __future__ import annotations

import _socket
import _thread
import os

from guest.agent import devices, files, huge_pages, kernel, limits, modules, namespaces, sysctl
from guest.agent.container import ROOT, Container, bundle_of
from guest.agent.errors import AgentError
from guest.agent.mounts import Mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.wire import Message

_RESOLV_CONF = f"{ROOT}/sandbox/resolv.conf"
_MODULES = f"{ROOT}/shared/containers/.modules"
_TUN = (10, 200)
# The kernel loads all other modules of packet filters on demand, but legacy iptables expects these.
_FILTERS = ("ip_tables", "ip6_tables")
_END_TIMEOUT_S = 2.0
_ALIASES = {"mnt": "mount", "net": "network"}
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_REST = _FIRST | frozenset("._-")


class Sandbox:
    """The state of the one sandbox of this machine."""

    def __init__(self) -> None:
        #: Whether a program of a container may have run.
        self.is_used = False
        self._lock = _thread.allocate_lock()
        self._containers: dict[str, Container | None] = {}
        self._mounts = Mounts()
        self._created = False
        self._shared: dict[str, str] = {}
        self._pid_lock = _thread.allocate_lock()

    def create(self, request: Message) -> None:
        """Set up the sandbox, once.

        Two fields have no effect: a PID namespace is made when a container wants to share it, and the image
        holds no programs that could be hooks.

        :param request: grpc.CreateSandboxRequest.
        :raises AgentError: if it was set up before: a second time would empty the mounted share; or a
            kernel module or storage is missing.
        :raises OSError: if a namespace or storage cannot be made.
        """
        with self._lock:
            if self._created:
                raise AgentError("sandbox: it exists already; use another machine")
            self._created = True
        files.make_directories(ROOT)
        # Made now, not at boot, because all clones come from one boot. See machine-id(5).
        files.create("/etc/machine-id", f"{os.urandom(16).hex()}\n")
        if request.hostname:
            _socket.sethostname(request.hostname)
        self._shared = {"ipc": namespaces.IPC, "uts": namespaces.UTS}
        self._mounts.hold(request.storages)
        modules.share(_MODULES)
        for module in request.kernel_modules:
            if not modules.load(module.name, parameters=" ".join(module.parameters)):
                raise AgentError(
                    f"sandbox: kernel module {module.name}: neither in the image nor beside it; check it"
                )
        if request.dns:
            files.make_directories(f"{ROOT}/sandbox")
            files.create(_RESOLV_CONF, "\n".join(request.dns))
            kernel.mount(_RESOLV_CONF, "/etc/resolv.conf", flags=kernel.MS_BIND)

    def create_container(self, request: Message) -> Container:
        """Create a container up to the point where its init waits to be started.

        :param request: grpc.CreateContainerRequest.
        :returns: the container.
        :raises AgentError: if the id is bad or taken, or the container cannot be created.
        :raises OSError: if a storage cannot be mounted, or a module not loaded.
        """
        container_id, spec = request.container_id, request.OCI
        if container_id[:1] not in _FIRST or not _REST.issuperset(container_id):
            raise AgentError(
                f"create: {container_id!r}: not a container id; use letters, digits, '.', '_', '-'"
            )
        if spec is None or spec.Linux is None:
            raise AgentError(f"create: {container_id}: the request has no specification; send it")
        with self._lock:
            if container_id in self._containers:
                raise AgentError(f"create: {container_id}: it exists already; choose another id")
            self._containers[container_id] = None
        held: list[str] = []
        try:
            resources = spec.Linux.Resources
            if resources is not None and resources.HugepageLimits:
                huge_pages.reserve(container_id, huge_pages.limits_of(resources.HugepageLimits))
            held = self._mounts.hold(request.storages)
            numbers, nodes = devices.find(request.devices)
            chosen = self._namespaces(spec.Linux, shares_pid=request.sandbox_pidns)
            limits.accept(spec.Annotations)
            sysctl.apply(
                spec.Linux.Sysctl,
                namespaces=[self._shared[kind] for kind in ("ipc", "uts") if kind in self._shared],
            )
            if any((device.Major, device.Minor) == _TUN for device in spec.Linux.Devices):
                modules.load("tun")
            capabilities = spec.Process.Capabilities if spec.Process else None
            if capabilities and "CAP_NET_ADMIN" in capabilities.Bounding:
                for name in _FILTERS:
                    modules.load(name)
            container = Container(container_id, spec, namespaces=chosen, devices=numbers, nodes=nodes)
        except BaseException:
            self._forget(container_id, held)
            raise
        container.storages = held
        with self._lock:
            self._containers[container_id] = container
        return container

    def _namespaces(self, linux: Message, *, shares_pid: bool) -> list[dict[str, str]]:
        """Choose the namespaces: ipc and uts are the sandbox's, and only the request decides about pid."""
        chosen = []
        for namespace in linux.Namespaces:
            kind = _ALIASES.get(namespace.Type, namespace.Type)
            if kind in {"pid", "cgroup"}:
                continue
            path = self._shared.get(kind, "") if kind in {"ipc", "uts"} else namespace.Path
            chosen.append({"type": kind, "path": path} if path else {"type": kind})
        chosen.append({"type": "pid", "path": self._shared_pid()} if shares_pid else {"type": "pid"})
        # Cgroup v2 shows a container its own tree only through a namespace.
        chosen.append({"type": "cgroup"})
        return chosen

    def _shared_pid(self) -> str:
        """Make the shared PID namespace when the first container wants it, because few pods do."""
        with self._pid_lock:
            if "pid" not in self._shared:
                self._shared["pid"] = namespaces.share_pid()
            return self._shared["pid"]

    def change_volume(self, storage: Message) -> None:
        """Mount a volume that belongs to no container, or unmount it if it has no source.

        :param storage: grpc.Storage.
        :raises AgentError: if it cannot be mounted.
        :raises OSError: as above.
        """
        if storage.source:
            self._mounts.hold([storage])
        else:
            self._mounts.release([storage.mount_point])

    def container(self, container_id: str, error: type[AgentError]) -> Container:
        """Find a container.

        :param container_id: its id.
        :param error: what to raise if there is none.
        :returns: the container.
        :raises AgentError: of the given kind.
        """
        with self._lock:
            container = self._containers.get(container_id)
        if container is None:
            raise error(f"invalid container id: {container_id}")
        return container

    def remove_container(self, container_id: str, *, timeout_s: int) -> None:
        """Kill and undo a container.

        :param container_id: its id.
        :param timeout_s: how long its processes may take to die; 0 for the default.
        :raises AgentError: if there is none, or it cannot be removed.
        """
        container = self.container(container_id, AgentError)
        container.remove(timeout_s)
        self._forget(container_id, container.storages)

    def _forget(self, container_id: str, storages: list[str]) -> None:
        self._mounts.release(storages)
        huge_pages.release(container_id)
        files.remove_tree(bundle_of(container_id))
        with self._lock:
            self._containers.pop(container_id, None)

    def destroy(self) -> None:
        """Kill every container; the machine is switched off after that."""
        with self._lock:
            containers = [container for container in self._containers.values() if container is not None]
        for container in containers:
            container.signal_all()
        for container in containers:
            container.init.end.wait(_END_TIMEOUT_S)
        self._mounts.release_all()
