"""The sandbox: namespaces that its containers share, storages, and the containers themselves."""

from __future__ import annotations

import _socket
import _thread

from guest.agent import files, kernel, modules, storage, sysctl
from guest.agent.console import log
from guest.agent.container import ROOT, Container, bundle_of
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from guest.agent.wire import Message

_NAMESPACES = "/run/sandbox-ns"
_RESOLV_CONF = f"{ROOT}/sandbox/resolv.conf"
_TUN = (10, 200)
_ALIASES = {"mnt": "mount", "net": "network"}
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_REST = _FIRST | frozenset("._-")


class Sandbox:
    """Everything the agent keeps for the one sandbox of this machine."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._containers: dict[str, Container | None] = {}
        self._mounts: dict[str, int] = {}
        self._created = False
        self._shared: dict[str, str] = {}
        self._pid_owner = ""

    def create(self, request: Message) -> None:
        """Set the sandbox up, once.

        :param request: grpc.CreateSandboxRequest.
        :raises AgentError: if it was set up before: a second time would empty the mounted share.
        :raises OSError: if a namespace or storage cannot be made.
        """
        with self._lock:
            if self._created:
                raise AgentError("sandbox: it exists already; use another machine")
            self._created = True
        if request.kernel_modules:
            raise AgentError("sandbox: kernel modules cannot be asked for; build them into the image")
        files.make_directories(ROOT)
        files.make_directories(_NAMESPACES)
        self._share("ipc", kernel.CLONE_NEWIPC, "")
        self._share("uts", kernel.CLONE_NEWUTS, request.hostname)
        self.add_storages(request.storages)
        if request.dns:
            files.make_directories(f"{ROOT}/sandbox")
            files.create(_RESOLV_CONF, "\n".join(request.dns))
            kernel.mount(_RESOLV_CONF, "/etc/resolv.conf", flags=kernel.MS_BIND)

    def _share(self, kind: str, flag: int, hostname: str) -> None:
        """Make a namespace and pin it with a bind mount, on a thread that ends with it."""
        path = f"{_NAMESPACES}/{kind}"
        files.create(path, "")
        failures: list[OSError] = []
        done = _thread.allocate_lock()
        done.acquire()

        def make() -> None:
            try:
                kernel.unshare(flag)
                if hostname:
                    _socket.sethostname(hostname)
                own = f"/proc/self/task/{_thread.get_native_id()}/ns/{kind}"
                kernel.mount(own, path, flags=kernel.MS_BIND)
            except OSError as error:
                failures.append(error)
            done.release()

        _thread.start_new_thread(make, ())
        done.acquire()
        if failures:
            raise failures[0]
        self._shared[kind] = path

    def add_storages(self, storages: Iterable[Message]) -> list[str]:
        """Mount storages; one that another container has mounted already is shared.

        :param storages: grpc.Storage messages.
        :returns: the mount points to give back with :meth:`drop_storages`.
        :raises AgentError: if a driver is unknown.
        :raises OSError: if a mount fails; those before it are undone.
        """
        held: list[str] = []
        try:
            for one in storages:
                with self._lock:
                    if one.mount_point in self._mounts:
                        self._mounts[one.mount_point] += 1
                        held.append(one.mount_point)
                        continue
                    if storage.add(one):
                        # Shared ones stay as long as the sandbox.
                        self._mounts[one.mount_point] = 2 if one.shared else 1
                        held.append(one.mount_point)
        except BaseException:
            self.drop_storages(held)
            raise
        return held

    def drop_storages(self, mount_points: list[str]) -> None:
        """Give storages back; the last user unmounts.

        :param mount_points: what :meth:`add_storages` returned.
        """
        for mount_point in reversed(mount_points):
            with self._lock:
                self._mounts[mount_point] -= 1
                if self._mounts[mount_point]:
                    continue
                del self._mounts[mount_point]
                try:
                    kernel.unmount(mount_point, flags=kernel.MNT_DETACH)
                except OSError as error:
                    log(f"storage: {mount_point}: {error}")

    def create_container(self, request: Message) -> Container:
        """Create a container up to the point where its init waits to be started.

        :param request: grpc.CreateContainerRequest.
        :returns: the container.
        :raises AgentError: if the id is bad or taken, or the container cannot be created.
        :raises OSError: if a storage cannot be mounted, or a module not loaded.
        """
        container_id, spec = request.container_id, request.OCI
        if len(container_id) < 2 or container_id[0] not in _FIRST or not _REST.issuperset(container_id):
            raise AgentError(
                f"create: {container_id!r}: not a container id; use letters, digits, '.', '_', '-'"
            )
        if spec is None or spec.Linux is None:
            raise AgentError(f"create: {container_id}: the request has no specification; send it")
        if request.devices:
            raise AgentError(f"create: {container_id}: devices cannot be passed yet; leave them out")
        with self._lock:
            if container_id in self._containers:
                raise AgentError(f"create: {container_id}: it exists already; choose another id")
            self._containers[container_id] = None
        held: list[str] = []
        try:
            held = self.add_storages(request.storages)
            namespaces = self._namespaces(spec.Linux, shares_pid=request.sandbox_pidns)
            sysctl.apply(
                spec.Linux.Sysctl,
                namespaces=[self._shared[kind] for kind in ("ipc", "uts") if kind in self._shared],
            )
            if any((device.Major, device.Minor) == _TUN for device in spec.Linux.Devices):
                modules.load("tun")
            container = Container(container_id, spec, namespaces=namespaces)
        except BaseException:
            self._forget(container_id, held)
            raise
        container.storages = held
        with self._lock:
            if "pid" not in self._shared:
                self._pin_pid(container)
            self._containers[container_id] = container
        return container

    def _namespaces(self, linux: Message, *, shares_pid: bool) -> list[dict[str, str]]:
        """Choose the namespaces: ipc and uts are the sandbox's, pid is decided by the request alone."""
        chosen = []
        for namespace in linux.Namespaces:
            kind = _ALIASES.get(namespace.Type, namespace.Type)
            if kind in {"pid", "cgroup"}:
                continue
            path = self._shared.get(kind, "") if kind in {"ipc", "uts"} else namespace.Path
            chosen.append({"type": kind, "path": path} if path else {"type": kind})
        pid = self._shared.get("pid", "") if shares_pid else ""
        chosen.append({"type": "pid", "path": pid} if pid else {"type": "pid"})
        # Cgroup v2 shows a container its own tree only through a namespace.
        chosen.append({"type": "cgroup"})
        return chosen

    def _pin_pid(self, container: Container) -> None:
        """Keep the first container's PID namespace for those that want to share it."""
        if not self._created:
            return
        path = f"{_NAMESPACES}/pid"
        try:
            files.create(path, "")
            kernel.mount(f"/proc/{container.init.pid}/ns/pid", path, flags=kernel.MS_BIND)
        except OSError as error:
            log(f"sandbox: pid namespace of {container.id}: {error}")
            return
        self._shared["pid"] = path
        self._pid_owner = container.id

    def _unpin_pid(self) -> None:
        """Let the namespace go with its first process; the next container created is the first again."""
        kernel.unmount(self._shared.pop("pid"), flags=kernel.MNT_DETACH)
        self._pid_owner = ""

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
        self.drop_storages(storages)
        files.remove_tree(bundle_of(container_id))
        with self._lock:
            self._containers.pop(container_id, None)
            if self._pid_owner == container_id:
                self._unpin_pid()

    def destroy(self) -> None:
        """Kill every container; the machine is switched off after that."""
        with self._lock:
            containers = [container for container in self._containers.values() if container is not None]
        for container in containers:
            container.signal_all()
