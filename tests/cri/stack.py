"""A containerd that serves the container runtime interface in its own network."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cri import image
from tests.cri.client import Cri
from tests.e2e import census
from tests.e2e.conftest import write_config
from tests.e2e.containerd import NAMESPACE, SHIM_DIRECTORY, UNNEEDED_PLUGINS, Containerd, running
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.e2e.census import Census
    from tests.e2e.containerd import Release
    from tests.e2e.nursery import Nursery

NETWORK_PLUGINS = Path("/usr/lib/cni")
NETWORK_RESULTS = Path("/var/lib/cni")
GATEWAYS = ("10.88.0.1", "fd00:88::1")
HOME_PREFIX = "hako-cri-"
CGROUP_PARENT = f"/{NAMESPACE}"
CLONE_NEWNET = 0x40000000
BY_PATH = "hako-by-path"
"""A handler of containerd 2 whose type is runc's, and whose path is Hako's."""
POD_ANNOTATIONS = 'pod_annotations = ["io.hako.*", "io.katacontainers.*"]\n'
IMAGES_TIMEOUT_S = patient(60.0)
BOOT_TIMEOUT_S = patient(240)
"""Ten machines that boot at once on two processors, which others need, too, take minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A containerd, who runs its pods, its own pause containers or the shim's Sandbox API, and over what."""

    release: Release
    sandboxer: str
    protocol: str = "ttrpc"

    def __str__(self) -> str:
        """Return the name of the kind."""
        return "-".join([self.release.name, self.sandboxer, *(["grpc"] if self.protocol == "grpc" else [])])


@dataclass(slots=True, kw_only=True)
class CriContainerd(Containerd):
    """A daemon whose runtime interface offers ``hako``, ``runc`` and, if it is new, ``hako-by-path``."""

    sandboxer: str

    def configuration(self, *, unneeded: Sequence[str] = UNNEEDED_PLUGINS) -> str:
        """Return the text of the daemon's configuration file."""
        needed = ("cri", "podsandbox")
        plugins = [plugin for plugin in unneeded if not any(word in plugin for word in needed)]
        common = "restrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n"
        if self.release.config_version == 2:
            runtime, network = "io.containerd.grpc.v1.cri", f'bin_dir = "{NETWORK_PLUGINS}"'
            common += f'sandbox_image = "{image.PAUSE_IMAGE}"\n'
            pinned, mode = "", "sandbox_mode"
        else:
            runtime, network = "io.containerd.cri.v1.runtime", f'bin_dirs = ["{NETWORK_PLUGINS}"]'
            pinned = (
                f'[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "{image.PAUSE_IMAGE}"\n'
            )
            mode = "sandboxer"
        sandboxer = "" if self.release.name == "1.6" else f'{mode} = "{self.sandboxer}"\n'
        handlers = "".join(
            f'[plugins."{runtime}".containerd.runtimes.{name}]\nruntime_type = "io.containerd.{name}.v2"\n'
            f"privileged_without_host_devices = true\n{POD_ANNOTATIONS}{sandboxer}"
            for name in ("hako", "runc")
        )
        if self.release.config_version > 2:
            # containerd 2.0 and 2.1 ask for the features of no runtime of another type.
            handlers += (
                f'[plugins."{runtime}".containerd.runtimes.{BY_PATH}]\n'
                'runtime_type = "io.containerd.runc.v2"\n'
                f'runtime_path = "{SHIM_DIRECTORY}/containerd-shim-hako-v2"\n'
                "privileged_without_host_devices = true\n"
            )
        # A slotted dataclass is another class than the one that super() without arguments would look at.
        return (
            Containerd.configuration(self, unneeded=plugins)
            + f'[plugins."{runtime}"]\n{common}'
            + f'[plugins."{runtime}".cni]\n{network}\nconf_dir = "{self.home / "network"}"\n'
            + handlers
            + pinned
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A running containerd with its client.

    ``handler`` runs the pods, and ``network`` is the namespace that stands for the host's network.
    """

    kind: Kind
    containerd: CriContainerd
    cri: Cri
    handler: str
    network: Path
    state_directory: Path

    @property
    def is_hako(self) -> bool:
        """Tell whether the runtime is the one of this project and not one it is compared with."""
        return self.handler == "hako"

    @property
    def logs(self) -> Path:
        """The directory of the pods' logs."""
        return self.containerd.home / "logs"

    def census(self) -> Census:
        """Count the things on the machine that a pod may leave behind."""
        everything = census.take(self.containerd, state_directory=self.state_directory)
        # The devices of the machine's own network are others'.
        own = {
            thing: line
            for thing, line in everything.items()
            if self._is_own(line) and not line.startswith("network device")
        }
        return own | {line: line for line in self._of_pods()}

    def _is_own(self, line: str) -> bool:
        """Leave out things of another daemon of the tests, which may come and go at any time."""
        home = re.search(rf"\S*/{HOME_PREFIX}[^/]+/", line)
        own = (self.containerd.home, self.state_directory, self.network)
        return home is None or any(str(path) in line for path in own)

    def difference(self, before: Census) -> list[str]:
        """Return what changed since a census, once containerd had time to settle."""
        return census.settled_difference(before, self.census)

    def _of_pods(self) -> Iterator[str]:
        links = subprocess.run(
            ["/usr/bin/nsenter", f"--net={self.network}", "/usr/sbin/ip", "-oneline", "-brief", "link"],
            capture_output=True,
            text=True,
            check=True,
        )
        for line in links.stdout.splitlines():
            name = line.split()[0]
            if name.partition("@")[0] not in {"lo", "hako0"}:
                yield f"interface {name}"
        for directory in (
            *self.containerd.state.glob("*/netns"),
            self.containerd.home / "addresses" / "hako-cri",
            NETWORK_RESULTS / "results",
            *(
                base / plugin / kind
                for base in (self.containerd.state, self.containerd.root)
                for plugin in (
                    "io.containerd.grpc.v1.cri",
                    "io.containerd.sandbox.controller.v1.shim",
                    "io.containerd.podsandbox.controller.v1.podsandbox",
                )
                for kind in ("sandboxes", "containers", "k8s.io")
            ),
        ):
            with contextlib.suppress(FileNotFoundError):
                for path in directory.iterdir():
                    if path.name != "lock" and not path.name.startswith("last_reserved_ip"):
                        yield f"file {path}"


@contextlib.contextmanager
def inside(network: Path) -> Iterator[None]:
    """Let this thread's sockets belong to another network namespace for a block."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net", "rb") as home, network.open("rb") as there:  # noqa: PTH123 (a namespace)
        if libc.setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns: {network}")
        try:
            yield
        finally:
            if libc.setns(home.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns: the tests' own network")


@contextlib.contextmanager
def new_network(path: Path) -> Iterator[Path]:
    """Make a network namespace with a loopback interface, which a mounted file keeps for a block."""
    path.touch()
    up = ["/usr/sbin/ip", "link", "set", "lo", "up"]
    subprocess.run(["/usr/bin/unshare", f"--net={path}", *up], check=True)
    try:
        yield path
    finally:
        subprocess.run(["/usr/bin/umount", path], check=True)
        path.unlink()


def write_network_configuration(home: Path) -> None:
    """Describe the pods' network: a bridge, an address of each family, and routes to everywhere."""
    ranges = [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]]
    addresses = {
        "type": "host-local",
        "dataDir": str(home / "addresses"),
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    bridge = {"type": "bridge", "bridge": "hako0", "isGateway": True, "hairpinMode": True, "ipam": addresses}
    configuration = {"cniVersion": "0.4.0", "name": "hako-cri", "plugins": [bridge]}
    (home / "network").mkdir()
    (home / "network" / "10-hako.conflist").write_text(json.dumps(configuration), encoding="utf-8")


@contextlib.contextmanager
def opened_stack(
    home: Path,
    nursery: Nursery,
    archives: Sequence[Path],
    *,
    kind: Kind,
    handler: str,
    templates: Path | None,
) -> Iterator[Stack]:
    """Keep a containerd of a kind running for a block, with the images it needs.

    :param home: the directory below which it lives.
    :param nursery: the ancestor of its processes.
    :param archives: the images.
    :param kind: which containerd.
    :param handler: what runs the pods.
    :param templates: the store of what their machines are cloned from; None boots them cold.
    """
    state_directory = home / f"{kind}-hako"
    state_directory.mkdir(mode=0o700)
    config = write_config(
        home / f"{kind}.toml",
        state_directory=state_directory,
        protocol=kind.protocol,
        templates=templates,
        guest=f"boot_timeout_s = {BOOT_TIMEOUT_S:.0f}",
    )
    environment = {"HAKO_CONFIG": str(config)}
    if kind.sandboxer == "shim":
        environment["ENABLE_CRI_SANDBOXES"] = "1"  # only 1.7 asks for it
    place = home / str(kind)
    with new_network(home / f"{kind}-network") as network:
        daemon = CriContainerd(
            release=kind.release,
            home=place,
            nursery=nursery,
            environment=environment,
            runtime=f"io.containerd.{handler}.v2",
            namespace="k8s.io",
            launcher=("/usr/bin/nsenter", f"--net={network}"),
            sandboxer=kind.sandboxer,
        )
        place.mkdir()
        write_network_configuration(place)
        with running(daemon), Cri(daemon.address) as cri:
            for archive in archives:
                imported = daemon.ctr("images", "import", archive)
                assert imported.code == 0, imported.stderr
            _wait_for_images(cri)
            yield Stack(
                kind=kind,
                containerd=daemon,
                cri=cri,
                handler=handler,
                network=network,
                state_directory=state_directory,
            )


def _wait_for_images(cri: Cri) -> None:
    deadline = time.monotonic() + IMAGES_TIMEOUT_S
    for name in (image.IMAGE, image.PAUSE_IMAGE):
        while not cri.call("ImageStatus", image={"image": name}).HasField("image"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"image {name}: the runtime interface does not know it")
            time.sleep(0.05)
