"""A container: its bundle, cgroup and processes."""

from __future__ import annotations

import _thread
import os

from guest.agent import cgroup, files, huge_pages, json_out, kernel, oci, oom, passwd, runtime
from guest.agent import devices as device_nodes
from guest.agent.console import log
from guest.agent.errors import AgentError, NotFound, cause
from guest.agent.process import Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest.agent.wire import Message

ROOT = "/run/kata-containers"
_SHARED = f"{ROOT}/shared/"
_RESERVED = frozenset({"sandbox", "shared"})
"""Names of other directories beside those of the containers."""
_REMOVAL_TIMEOUT_S = 60
_SIGKILL = 9


def bundle_of(container_id: str) -> str:
    """Name a container's directory.

    :param container_id: its id.
    :returns: the path.
    """
    # No id has a plus sign.
    return f"{ROOT}/+{container_id}" if container_id in _RESERVED else f"{ROOT}/{container_id}"


class Container:
    """A container that crun has created.

    :param container_id: its id.
    :param spec: grpc.Spec.
    :param namespaces: the final list of namespaces.
    :param devices: the guest's major and minor number by path, where they differ from the host's.
    :param nodes: device nodes that the host does not have.
    :raises AgentError: if a part of the specification is missing, or crun refuses it.
    :raises OSError: if the root filesystem cannot be mounted.
    """

    def __init__(
        self,
        container_id: str,
        spec: Message,
        *,
        namespaces: list[dict[str, str]],
        devices: dict[str, tuple[int, int]],
        nodes: list[dict[str, Any]],
    ) -> None:
        for name in ("Process", "Root", "Linux"):
            if getattr(spec, name) is None:
                raise AgentError(f"create: {container_id}: the specification has no {name}; send it")
        self.id = container_id
        self.storages: list[str] = []
        self._owns_root = True
        # Writes to the share reach the host at once, and those of a shared mapping when it is closed.
        self._is_root_on_host = spec.Root.Path.startswith(_SHARED)
        self._bundle = bundle_of(container_id)
        self._rootfs = f"{self._bundle}/rootfs"
        self._shared = [mount.source for mount in spec.Mounts if mount.source.startswith(_SHARED)]
        self._cgroup = cgroup.path_of(spec.Linux.CgroupsPath, container_id)
        self._lock = _thread.allocate_lock()
        self._execs: dict[str, Process | None] = {}
        document = oci.spec(spec, rootfs=self._rootfs, namespaces=namespaces, cgroup=self._cgroup)
        device_nodes.renumber(document["linux"], devices)
        device_nodes.add(document["linux"], nodes)
        self.shares_pid = any(one["type"] == "pid" and "path" in one for one in namespaces)
        self._capabilities = document["process"].get("capabilities")
        self._umask = document["process"]["user"].get("umask")
        self._mount_root(spec.Root.Path)
        try:
            passwd.give_home(document["process"], root=self._rootfs, mounts=document["mounts"])
            config = json_out.dumps(document)
            self.init = Process(
                runtime.create(container_id, config, bundle=self._bundle, process=document["process"])
            )
        except BaseException:
            self._discard()
            raise
        oom.watch(container_id, self._cgroup)

    def _mount_root(self, source: str) -> None:
        # An overlay storage may have been mounted here already.
        if files.exists(self._rootfs):
            self._owns_root = False
            return
        files.make_directories(self._rootfs)
        kernel.mount(source, self._rootfs, flags=kernel.MS_BIND)

    def start(self) -> None:
        """Let the init run.

        :raises AgentError: with crun's own message, if it cannot.
        """
        for source in self._shared:
            # Files may have grown since the container was made: Docker writes resolv.conf, hooks write hosts.
            # A size that the guest remembers would cut them off.
            try:
                kernel.ask_size(source)
            except OSError as error:
                log(f"start: {self.id}: {error}")
        runtime.start(self.id)

    def execute(self, exec_id: str, message: Message) -> Process:
        """Create and start another process.

        :param exec_id: its id.
        :param message: grpc.Process.
        :returns: the process.
        :raises AgentError: if the id is taken, or crun refuses.
        """
        document = oci.process(message)
        if "capabilities" not in document and self._capabilities is not None:
            document["capabilities"] = self._capabilities
        if self._umask is not None:
            document["user"]["umask"] = self._umask
        passwd.give_home(document, root=f"/proc/{self.init.pid}/root")
        with self._lock:
            if exec_id in self._execs or exec_id in {"", self.id}:
                raise AgentError(f"exec: {exec_id}: the id exists already; choose another")
            self._execs[exec_id] = None
        try:
            process = self._launch(document)
        except BaseException:
            with self._lock:
                del self._execs[exec_id]
            raise
        with self._lock:
            self._execs[exec_id] = process
        return process

    def _launch(self, document: dict[str, Any]) -> Process:
        path = f"{self._bundle}/process.{_thread.get_ident()}.json"
        files.create(path, json_out.dumps(document), mode=0o600)
        try:
            return Process(
                runtime.launch(["exec", "--detach", f"--process={path}"], self.id, process=document)
            )
        finally:
            os.unlink(path)

    def process(self, exec_id: str) -> Process:
        """Find a process.

        :param exec_id: its id; empty, or the container's own, for init.
        :returns: the process.
        :raises NotFound: if there is none, or it has been forgotten.
        """
        if exec_id in {"", self.id}:
            return self.init
        with self._lock:
            process = self._execs.get(exec_id)
        if process is None:
            raise NotFound(f"process: {exec_id}: not in container {self.id}")
        return process

    def processes(self) -> list[tuple[int, str]]:
        """List every process of the container: its pid in the guest, and its exec's id if it is one.

        :raises OSError: if the cgroup is gone.
        """
        with self._lock:
            execs = {process.pid: exec_id for exec_id, process in self._execs.items() if process is not None}
        return [(pid, execs.get(pid, "")) for pid in cgroup.pids(self._cgroup)]

    def forget_if_done(self, exec_id: str) -> None:
        """Forget an exec whose status and output have both been taken; init stays until removal.

        :param exec_id: its id.
        """
        with self._lock:
            process = self._execs.get(exec_id)
            if process is None or not process.is_done:
                return
            del self._execs[exec_id]
        process.streams.close()

    def signal_all(self) -> None:
        """Kill every process of the container."""
        cgroup.kill(self._cgroup)
        # Before start, the init may be in another cgroup; while frozen, it ignores the cgroup's kill.
        self.init.signal(_SIGKILL)

    def update(self, resources: Message) -> None:
        """Change the limits.

        :param resources: grpc.LinuxResources.
        :raises AgentError: with crun's own message, if it refuses.
        """
        if resources.HugepageLimits:
            huge_pages.reserve(self.id, huge_pages.limits_of(resources.HugepageLimits))
        path = f"{self._bundle}/resources.{_thread.get_ident()}.json"
        files.create(path, json_out.dumps(oci.resources(resources)), mode=0o600)
        try:
            runtime.run("update", f"--resources={path}", self.id)
        finally:
            os.unlink(path)

    def freeze(self, *, frozen: bool) -> None:
        """Pause or resume every process.

        :param frozen: the wanted state.
        """
        cgroup.freeze(self._cgroup, frozen=frozen)

    @property
    def cgroup(self) -> str:
        """The container's cgroup."""
        return self._cgroup

    def remove(self, timeout_s: int) -> None:
        """Kill the remaining processes, and undo everything except the bundle and the storages in it.

        :param timeout_s: how long the processes may take to die; 0 for the default.
        :raises AgentError: if they do not, or crun cannot delete the container.
        """
        self.signal_all()
        if not self.init.end.wait(timeout_s or _REMOVAL_TIMEOUT_S):
            raise AgentError(f"remove: {self.id}: init does not die; destroy the sandbox")
        oom.forget(self.id)
        runtime.delete(self.id, path=self._cgroup)
        self.init.streams.close()
        with self._lock:
            execs = [process for process in self._execs.values() if process is not None]
            self._execs.clear()
        for process in execs:
            process.streams.close()
        self._discard()

    def _discard(self) -> None:
        if not self._is_root_on_host:
            try:
                # From now on, the host may kill the machine at any time: no dirty data may stay in memory.
                kernel.sync_filesystem(self._rootfs)
            except OSError as error:
                # A removed disk can never take the data; the container has seen errors.
                log(f"remove: {self.id}: {error}")
        try:
            if self._owns_root:
                kernel.unmount(self._rootfs, flags=kernel.MNT_DETACH)
        except OSError as error:
            raise AgentError(f"remove: {self.id}: {cause(error)}") from error
