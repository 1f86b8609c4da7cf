"""The Debian package on its own hosts, Debian 12 and 13, without a network and without a compiler."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from scripts.debian import root
from scripts.document import ROOT
from shim.commands.image import GUEST_DIRECTORY
from tests.e2e import debian_host
from tests.e2e.busybox import IMAGE, write_image
from tests.e2e.debian_host import FILES
from tests.e2e.life import until
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.debian_host import DebianHost

pytestmark = [pytest.mark.nightly, pytest.mark.hako, pytest.mark.timeout(patient(1800))]

OLD, NEW = "0.0.1", "0.0.2"
BUILD_S = patient(600.0)
# dpkg-deb(1): the usual level takes minutes for a package with a guest.
QUICKLY = {**os.environ, "DPKG_DEB_COMPRESSOR_LEVEL": "0"}
END_S = patient(30.0)
MIB = 1 << 20
RUNTIME = "io.containerd.hako.v2"
IMPORTS = 'imports = ["/etc/containerd/conf.d/*.toml"]'
ENDPOINT = "http://127.0.0.1:4318/v1/traces"
# Keeps what is posted to it, each in a file.
RECEIVER = f"""
import http.server, itertools, pathlib
numbers = itertools.count()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        pathlib.Path(f"{FILES}/{{next(numbers)}}.trace").write_bytes(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", 4318), Handler)
print("up", flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two packages, of which the older one brings its guest along, and an image for containers."""
    place = tmp_path_factory.mktemp("packages")
    made = []
    for version, guest in ((OLD, ["--with-guest", str(GUEST_DIRECTORY)]), (NEW, [])):
        argv: list[str | Path] = [ROOT / "scripts/package", "--output", place, "--version", version]
        argv += guest
        done = subprocess.run(
            argv, env=QUICKLY, stdout=subprocess.PIPE, text=True, check=True, timeout=BUILD_S
        )
        made.append(place / done.stdout.splitlines()[-1])
    write_image(place / "busybox.tar")
    return [*made, place / "busybox.tar"]


@pytest.fixture(params=root.SUITES)
def host(
    request: pytest.FixtureRequest, files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DebianHost]:
    """A host that has containerd and never had Hako."""
    place = tmp_path_factory.mktemp(request.param)
    with debian_host.running(root.make(request.param), place, files=files) as found:
        yield found


def package(version: str) -> str:
    return f"{FILES}/hako_{version}_amd64.deb"


def install(host: DebianHost) -> None:
    """Install the older package as docs/install.md says."""
    host.do("dpkg", "--install", package(OLD))
    refused = host.run("hako", "install")
    assert refused.code == 1
    assert IMPORTS in refused.stderr
    host.do("sed", "-i", f"s#^version = 2#&\\n{IMPORTS}#", "/etc/containerd/config.toml")
    host.do("hako", "install")
    host.start_containerd()
    host.do(*host.ctr("images", "import", f"{FILES}/busybox.tar"))


def run(host: DebianHost, name: str, *command: str, options: tuple[str, ...] = ("--rm",)) -> str:
    return host.do(*host.ctr("run", "--runtime", RUNTIME, *options, IMAGE, name, *command))


def start(host: DebianHost, name: str, *options: str) -> None:
    run(host, name, "sleep", "100000", options=("--detach", *options))


def execute(host: DebianHost, name: str, *command: str) -> str:
    return host.do(*host.ctr("task", "exec", "--exec-id", f"e{time.monotonic_ns()}", name, *command))


def end(host: DebianHost, name: str) -> None:
    host.do(*host.ctr("task", "kill", "--signal", "SIGKILL", name))

    def is_stopped() -> bool:
        lines = [line.split() for line in host.do(*host.ctr("task", "ls")).splitlines()]
        return [name, "STOPPED"] in [[line[0], line[-1]] for line in lines]

    until(is_stopped, what=f"the end of {name}", timeout_s=END_S)
    host.run(*host.ctr("task", "delete", name))  # it fails with the task's own status
    host.do(*host.ctr("container", "delete", name))


@contextlib.contextmanager
def collecting(host: DebianHost) -> Iterator[None]:
    """Have a collector of traces in a host for a block."""
    argv = host.argv("/usr/bin/python3", "-ISc", RECEIVER)
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as receiver:
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == b"up\n"
            yield
        finally:
            receiver.terminate()


def sandboxes(host: DebianHost) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in json.loads(host.do("hako", "ps", "--json"))}


def releases(host: DebianHost) -> set[str]:
    """The versions of the releases that are there."""
    names = host.names("/usr/lib/hako") - {"current", "package"}
    return {name.rpartition("-")[0] for name in names}


def assert_nothing_is_left(host: DebianHost, *, mounts: list[str], written: set[str]) -> None:
    until(lambda: not host.processes(), what="the end of all processes", timeout_s=END_S)
    assert host.cgroups() == []
    assert [each for each in host.mounts() if each not in mounts] == []
    assert host.names("/run/containerd/s") == set()
    assert host.run("test", "-e", "/run/hako").code == 1
    assert host.written() - written == set()


def test_a_container_lives_on_a_host_that_has_only_the_package(host: DebianHost) -> None:
    mounts, written = host.mounts(), host.written()

    install(host)
    assert host.do("hako", "version") == f"{OLD}\n"
    host.do("hako", "check")
    assert host.do("hako", "install").startswith("unchanged: ")
    start(host, "box", "--memory-limit", str(256 * MIB), "--cpus", "1")
    description = json.loads((GUEST_DIRECTORY / "image.json").read_text(encoding="utf-8"))
    assert execute(host, "box", "uname", "-r") == f"{description['kernel_release']}\n"
    processors, memory = execute(host, "box", "sh", "-c", "nproc; grep MemTotal /proc/meminfo").splitlines()
    assert processors == "2"
    assert int(memory.split()[1]) > 600 * 1024
    host.do("hako", "template", "build")
    assert run(host, "clone", "echo", "cloned") == "cloned\n"
    assert ": cloned" in host.do("cat", "/var/log/containerd.log")
    end(host, "box")

    host.do("dpkg", "--purge", "hako")
    host.do("sed", "-i", "/^imports/d", "/etc/containerd/config.toml")
    assert_nothing_is_left(host, mounts=mounts, written=written | {"etc/containerd/config.toml"})


def test_the_package_sends_traces_by_its_own_libraries(host: DebianHost) -> None:
    install(host)
    setting = f'[shim]\\ntracing_endpoint = "{ENDPOINT}"\\n'
    host.do("sh", "-c", f"mkdir -p /etc/hako; printf '{setting}' >/etc/hako/config.toml")
    host.do("hako", "config", "check", "/etc/hako/config.toml")
    with collecting(host):
        run(host, "traced", "true")
        until(lambda: host.received(b"container start"), what="a trace", timeout_s=END_S)
    assert host.received(b"sandbox start")
    assert host.do("cat", "/var/log/hako/tracing.log") == ""


def test_an_upgrade_leaves_running_sandboxes_their_release(host: DebianHost) -> None:
    install(host)
    start(host, "old")
    start(host, "killed")
    host.do("hako", "template", "build")
    [template] = json.loads(host.do("hako", "template", "ls", "--json"))

    host.do("dpkg", "--install", package(NEW))
    host.do("hako", "install", "--no-image")  # this package brings none along
    assert execute(host, "old", "echo", "there") == "there\n"
    start(host, "new")
    versions = {name: each["version"] for name, each in sandboxes(host).items()}
    assert versions == {"old": OLD, "killed": OLD, "new": NEW}
    [zygote] = {line.partition("/bin/")[0] for line in host.processes().values() if "-zygote" in line}
    assert NEW in zygote
    [kept] = json.loads(host.do("hako", "template", "ls", "--json"))
    assert kept["key"] == template["key"]
    assert kept["built_at_s"] == template["built_at_s"]
    assert releases(host) == {OLD, NEW}

    end(host, "old")
    assert releases(host) == {OLD, NEW}
    [shim] = [pid for pid, line in host.processes().items() if "-id killed" in line and OLD in line]
    os.kill(shim, signal.SIGKILL)
    until(lambda: releases(host) == {NEW}, what="the end of the old release", timeout_s=END_S)
    assert execute(host, "new", "echo", "there") == "there\n"


def test_a_purge_leaves_running_sandboxes_what_they_need_until_the_last_ends(host: DebianHost) -> None:
    mounts, written = host.mounts(), host.written()
    install(host)
    start(host, "cold", "--cap-add", "CAP_NET_ADMIN")
    host.do("hako", "template", "build")
    start(host, "clone")

    assert "cold of namespace" in host.run("hako", "uninstall").stderr
    told = host.do("dpkg", "--purge", "hako")
    assert "left to their end: " in told
    assert "the last one removes /var/lib/hako /var/cache/hako /var/log/hako" in told
    assert host.run("test", "-e", "/usr/bin/hako").code == 1
    execute(host, "cold", "ip", "link", "add", "late", "type", "dummy")  # by a module from the host
    end(host, "clone")
    assert "purged" in host.names("/usr/lib/hako")
    assert execute(host, "cold", "echo", "there") == "there\n"
    end(host, "cold")

    host.do("sed", "-i", "/^imports/d", "/etc/containerd/config.toml")
    assert_nothing_is_left(host, mounts=mounts, written=written | {"etc/containerd/config.toml"})
