"""Docker's commands do with confined machines what they do with runc."""

from __future__ import annotations

import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts.docker import RELEASES
from tests.e2e import dockerd
from tests.e2e.conftest import HAKO, RUNC
from tests.e2e.dockerd import IMAGE, Docker
from tests.e2e.life import MOMENT_S
from tests.e2e.test_refusals import configured
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.nightly, pytest.mark.hako, pytest.mark.timeout(900)]

PORT = 8088
SERVER = ("sh", "-c", "mkdir /site; echo served >/site/index.html; exec httpd -f -p 80 -h /site")


@pytest.fixture(
    scope="module",
    params=[(release, runtime) for runtime in (RUNC, HAKO) for release in RELEASES],
    ids=lambda param: f"{param[0]}-{param[1].split('.')[2]}",
)
def docker(request: pytest.FixtureRequest, one_stack: Stack, templates: Path, home: Path) -> Iterator[Docker]:
    """Each Docker with each runtime; Hako must confine its machines."""
    release, runtime = request.param
    with (
        tempfile.TemporaryDirectory(dir=home, ignore_cleanup_errors=True) as place,
        configured(one_stack, templates=templates, hypervisor='jail = "required"'),
        dockerd.running(one_stack, Path(place), release=release, runtime=runtime) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def server(docker: Docker) -> Iterator[str]:
    """A web server with a published port."""
    name = docker.start("--name", "server", "--publish", f"127.0.0.1:{PORT}:80", IMAGE, *SERVER)
    yield name
    docker.tell("rm", "--force", "--volumes", name)


def test_outputs_inputs_and_statuses_are_the_commands(docker: Docker) -> None:
    told = docker.run("--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (told.code, told.stdout, told.stderr) == (7, "out\n", "err\n")
    assert docker.run("--rm", "--interactive", IMAGE, "cat", stdin=b"some input").stdout == "some input"
    assert (
        docker.run("--rm", "--tty", IMAGE, "sh", "-c", "test -t 0 && echo terminal").stdout == "terminal\r\n"
    )
    assert docker.run("--rm", IMAGE, "/no/such/program").code == 127


def test_users_capabilities_and_mounts_are_those_of_the_options(docker: Docker, tmp_path: Path) -> None:
    for name in ("written", "read"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    script = "id -u; id -g; grep CapEff /proc/self/status; echo new >/written/file; echo new >/memory/file"
    refused = "for one in /read/file /file; do touch $one 2>/dev/null && echo $one; done; hostname; true"
    told = docker.run(
        *("--rm", "--init", "--user", "1000:1001", "--cap-drop", "ALL", "--read-only", "--tmpfs", "/memory"),
        *("--hostname", "named", "--volume", f"{tmp_path}/written:/written"),
        *("--volume", f"{tmp_path}/read:/read:ro", IMAGE, "sh", "-c", f"{script}; {refused}"),
    )
    assert (told.code, told.stderr) == (0, "")
    assert told.stdout.split() == ["1000", "1001", "CapEff:", "0000000000000000", "named"]
    assert (tmp_path / "written/file").read_text() == "new\n"
    assert (tmp_path / "written/file").stat().st_uid == 1000


def test_a_process_over_its_memory_is_killed_and_docker_knows_why(docker: Docker) -> None:
    name = docker.start("--memory", "32m", IMAGE, "tail", "/dev/zero")
    try:
        assert docker.tell("wait", name) == "137"
        assert docker.look(name, "{{.State.OOMKilled}}") == "true"
    finally:
        docker.tell("rm", "--force", name)


def test_a_running_container_can_be_looked_at_and_changed(
    docker: Docker, server: str, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{PORT}/"
    until(
        lambda: docker("exec", server, "wget", "-qO-", url.replace(f"{PORT}", "80")).code == 0,
        within_s=MOMENT_S,
    )
    with urllib.request.urlopen(url, timeout=MOMENT_S) as answer:
        assert answer.read() == b"served\n"
    (tmp_path / "file").write_text("copied\n")
    docker.tell("cp", tmp_path / "file", f"{server}:/site/copy")
    assert docker.tell("exec", "--env", "A=b", server, "sh", "-c", "cat /site/copy; echo $A") == "copied\nb"
    docker.tell("cp", f"{server}:/site/index.html", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "served\n"
    docker.tell("pause", server)
    assert docker.look(server, "{{.State.Status}}") == "paused"
    docker.tell("unpause", server)
    docker.tell("update", "--memory", "200m", "--memory-swap", "400m", server)
    used = docker.tell("stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", server)
    assert int(used.split()[0]) >= 1
    assert used.endswith("/ 200MiB")
    assert docker.tell("exec", server, "true") == ""


def test_a_container_can_be_stopped_and_started_again(docker: Docker) -> None:
    name = docker.start(
        IMAGE, "sh", "-c", "echo began; trap 'echo told; exit 3' TERM; while :; do sleep 0.1; done"
    )
    try:
        until(lambda: "began" in docker.tell("logs", name), within_s=MOMENT_S)
        docker.tell("restart", name)
        until(lambda: docker.tell("logs", name) == "began\ntold\nbegan", within_s=MOMENT_S)
        docker.tell("stop", name)
        assert docker.look(name, "{{.State.Status}} {{.State.ExitCode}}") == "exited 3"
        docker.tell("start", name)
        docker.tell("kill", "--signal", "KILL", name)
        assert docker.tell("wait", name) == "137"
    finally:
        docker.tell("rm", "--force", name)


def test_containers_of_a_network_find_each_other_by_name(docker: Docker) -> None:
    asking = "until wget -qO- http://friend/; do sleep 0.2; done"
    names = ("first", "second")
    for name in names:
        docker.tell("network", "create", name)
    friend = docker.start("--network", "first", "--network-alias", "friend", IMAGE, *SERVER)
    try:
        docker.tell("network", "connect", "--alias", "friend", "second", friend)
        for name in names:
            asked = docker.run("--rm", "--network", name, IMAGE, "timeout", "60", "sh", "-c", asking)
            assert (asked.code, asked.stdout) == (0, "served\n"), asked.stderr
        docker.tell("network", "disconnect", "second", friend)
        cards = ("exec", friend, "ls", "/sys/class/net")
        until(lambda: docker.tell(*cards).split() == ["eth0", "lo"], within_s=MOMENT_S)
    finally:
        docker.tell("rm", "--force", friend)
        for name in names:
            docker.tell("network", "rm", name)
