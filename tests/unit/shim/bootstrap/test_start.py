"""``start`` as containerd runs it, up to the daemon's first line; the daemon itself is a stub."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.containerd import bootstrap_v1_pb2, runtime_options_pb2
from shim.bootstrap import start
from shim.telemetry import timeline
from shim.telemetry.journal import Journal
from shim.version import version

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from tests.unit.shim.conftest import Containerd


GROUPS = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"]


def params(container: str, **fields: Any) -> bootstrap_v1_pb2.BootstrapParams:
    return bootstrap_v1_pb2.BootstrapParams(instance_id=container, namespace="tests", **fields)


def test_containerd_1_6_gets_a_plain_address(either: Containerd) -> None:
    either.make_bundle("c2")
    del either.environment["MAX_SHIM_VERSION"]
    reply = either.run("start", "c2")
    assert (reply.returncode, reply.stderr) == (0, b"")
    assert reply.stdout.decode() == f"unix://{either.socket_path('c2')}"


def test_containerd_1_7_to_2_2_get_json(either: Containerd) -> None:
    either.make_bundle("c2")
    reply = either.run("start", "c2")
    assert (reply.returncode, reply.stderr) == (0, b"")
    assert json.loads(reply.stdout) == {
        "version": 2,
        "address": f"unix://{either.socket_path('c2')}",
        "protocol": "ttrpc",
    }


@pytest.fixture
def sockets() -> Iterator[Path]:
    # A unix socket's path must be short; the paths of pytest's directories are long.
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory) / "s"


def test_containerd_2_3_gets_a_bootstrap_result(either: Containerd, sockets: Path) -> None:
    bundle = either.make_bundle("c2")
    sent = params("c2", socket_dir=str(sockets), containerd_ttrpc_address="unix:///run/t.sock", log_level=-4)
    reply = either.run("start", "c2", stdin=sent.SerializeToString())
    assert (reply.returncode, reply.stderr) == (0, b"")
    result = bootstrap_v1_pb2.BootstrapResult.FromString(reply.stdout)
    path = either.socket_path("c2", directory=sockets)
    assert (result.version, result.address, result.protocol) == (2, f"unix://{path}", "ttrpc")
    assert path.is_socket()
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    record = json.loads((bundle / "hako" / "sandbox.json").read_text())
    assert (record["ttrpc_address"], record["debug"], record["dialect"]) == ("/run/t.sock", True, "2.3")


def test_the_address_file_holds_the_plain_address(containerd: Containerd) -> None:
    bundle = containerd.make_bundle("c1")
    containerd.run("start", "c1")
    assert (bundle / "address").read_text() == f"unix://{containerd.socket_path('c1')}"


def test_the_socket_is_for_its_owner_only(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    assert stat.S_IMODE(containerd.socket_path("c1").stat().st_mode) == 0o600


def test_the_socket_takes_connections_when_start_returns(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(containerd.socket_path("c1")))
        assert client.getpeername() == str(containerd.socket_path("c1"))


def test_the_daemon_holds_only_its_socket_and_the_log(containerd: Containerd) -> None:
    bundle = containerd.make_bundle("c1")
    containerd.run("start", "c1")
    descriptors = containerd.daemon("c1")["descriptors"]
    listener = descriptors.pop("3")
    assert descriptors == {"0": "/dev/null", "1": "/dev/null", "2": str(bundle / "log")}
    assert listener.startswith("socket:")


def test_the_daemon_leads_its_own_session(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    seen = containerd.daemon("c1")
    assert seen["session"] == seen["pid"]


def test_the_daemon_is_recognizable_in_process_lists(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    seen = containerd.daemon("c1")
    assert seen["command"] == "containerd-shim"
    assert seen["arguments"][4:6] == ["-id", "c1"]


def test_the_daemon_sends_systemd_no_notifications(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.environment["NOTIFY_SOCKET"] = "/run/systemd/notify"
    containerd.run("start", "c1")
    assert "NOTIFY_SOCKET" not in containerd.daemon("c1")["environment"]


def test_under_memory_pressure_the_daemon_dies_before_containerd(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert containerd.daemon("c1")["oom_score_adj"] == min(own + 1, 1000)


def test_a_kernel_without_core_scheduling_is_accepted(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.environment["SCHED_CORE"] = "1"
    assert containerd.run("start", "c1").returncode == 0


def test_a_bundle_without_a_log_works(containerd: Containerd) -> None:
    (containerd.make_bundle("c1") / "log").unlink()
    assert containerd.run("start", "c1").returncode == 0


def test_the_record_has_every_field_that_the_daemon_reads(containerd: Containerd) -> None:
    bundle = containerd.make_bundle("c1")
    containerd.environment["TTRPC_ADDRESS"] = "/run/t.sock"
    containerd.run("start", "c1", flags=("-debug",))
    record = json.loads((containerd.state_of("c1") / "sandbox.json").read_text())
    assert record.pop("started_at") > 0
    own = f'zygote = false\nstate_dir = "{containerd.state_dir}"\n'
    assert record == {
        "namespace": "tests",
        "hako_version": version(),
        "id": "c1",
        "bundle": str(bundle),
        "grpc_address": containerd.address,
        "ttrpc_address": "/run/t.sock",
        "publish_binary": "/usr/bin/containerd",
        "config_text": f'[shim]\n{own}log_dir = "{containerd.environment["STUB_LOG_DIR"]}"\n',
        "config_source": str(containerd.directory / "config.toml"),
        "protocol": "ttrpc",
        "socket_path": str(containerd.socket_path("c1")),
        "state_directory": str(containerd.state_of("c1")),
        "debug": True,
        "dialect": "1.7",
        "version": 2,
    }


def test_the_state_directory_is_for_its_owner_only(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    assert stat.S_IMODE(containerd.state_of("c1").stat().st_mode) == 0o700


@pytest.mark.parametrize("annotation", GROUPS)
def test_containers_of_a_group_share_one_shim(containerd: Containerd, annotation: str) -> None:
    containerd.make_bundle("pod", annotations={annotation: "pod"})
    member = containerd.make_bundle("member", annotations={annotation: "pod"})
    first = containerd.run("start", "pod")
    second = containerd.run("start", "member")
    assert second.stdout == first.stdout
    assert (member / "address").read_text() == f"unix://{containerd.socket_path('pod')}"
    assert len(list(containerd.state_dir.iterdir())) == 1


def test_a_shim_that_is_too_slow_for_its_callers_is_not_dead(containerd: Containerd) -> None:
    containerd.make_bundle("pod", annotations={GROUPS[0]: "pod"})
    containerd.make_bundle("member", annotations={GROUPS[0]: "pod"})
    first = containerd.run("start", "pod")
    with contextlib.ExitStack() as callers:
        with contextlib.suppress(BlockingIOError):
            while True:  # until the kernel lets no more connect, because the stub accepts no connection
                caller = callers.enter_context(socket.socket(socket.AF_UNIX))
                caller.setblocking(False)
                caller.connect(str(containerd.socket_path("pod")))
        second = containerd.run("start", "member")
    assert second.stdout == first.stdout
    assert len(containerd.shims()) == 1


def test_each_caller_is_answered_in_its_own_dialect(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    del containerd.environment["MAX_SHIM_VERSION"]
    assert containerd.run("start", "c1").stdout.decode() == f"unix://{containerd.socket_path('c1')}"


def test_a_dead_socket_is_replaced(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    path = containerd.socket_path("c1")
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert containerd.run("start", "c1").returncode == 0
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_leftovers_of_a_dead_shim_with_the_same_name_are_removed_first(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    killed = containerd.daemon("c1")["pid"]
    leftover = containerd.state_of("c1") / "leftover"
    leftover.touch()
    containerd.kill_shims()
    assert containerd.run("start", "c1").returncode == 0
    assert not leftover.exists()
    assert containerd.daemon("c1")["pid"] != killed


def test_the_configuration_comes_from_the_runtime_options(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    del containerd.environment["HAKO_CONFIG"]
    options = runtime_options_pb2.Options(config_path=str(containerd.directory / "config.toml"))
    sent = bootstrap_v1_pb2.Extension()
    sent.value.type_url = "runtimeoptions.v1.Options"
    sent.value.value = options.SerializeToString()
    assert containerd.run("start", "c1", stdin=sent.value.SerializeToString()).returncode == 0
    assert containerd.state_of("c1").is_dir()


def test_the_configuration_comes_from_an_extension(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    del containerd.environment["HAKO_CONFIG"]
    body = f'[shim]\nzygote = false\nstate_dir = "{containerd.state_dir}"\n'.encode()
    sent = params("c1")
    extension = sent.extensions.add().value
    extension.type_url = "type.googleapis.com/runtimeoptions.v1.Options"
    extension.value = runtime_options_pb2.Options(config_body=body).SerializeToString()
    assert containerd.run("start", "c1", stdin=sent.SerializeToString()).returncode == 0
    assert containerd.state_of("c1").is_dir()


def test_options_of_other_runtimes_are_ignored(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    sent = bootstrap_v1_pb2.Extension()
    sent.value.type_url = "containerd.runc.v1.Options"
    sent.value.value = b"\x18\x01"
    assert containerd.run("start", "c1", stdin=sent.value.SerializeToString()).returncode == 0


def refusal(containerd: Containerd, container: str = "c1", **arguments: Any) -> str:
    """Run a ``start`` that must fail and leave nothing behind; return its error line."""
    before = set(containerd.directory.rglob("*"))
    reply = containerd.run("start", container, **arguments)
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert not containerd.socket_path(container).exists()
    assert set(containerd.directory.rglob("*")) - before <= {containerd.state_dir}
    line = reply.stderr.decode()
    assert line
    assert "\n" not in line
    return line


def counted(log_dir: Path) -> list[tuple[str, str, str]]:
    """What a monitor reads of failed starts."""
    entries = list(Journal(log_dir).read())
    return [(each["kind"], each["phase"], each["cause"]) for each in entries]


def test_a_start_that_fails_before_there_is_a_shim_is_counted(either: Containerd) -> None:
    log_dir = either.directory / "log"
    either.configure(f'[shim]\nlog_dir = "{log_dir}"\nstate_dir = "{either.state_dir}"\n')
    (either.make_bundle("c2") / "config.json").write_text("{")
    assert either.run("start", "c2").returncode == 1
    assert counted(log_dir) == [("failure", "shim", "Refusal")]

    (either.bundle("c2") / "config.json").write_text("{}")
    assert either.run("start", "c2").returncode == 0
    assert len(counted(log_dir)) == 1


def test_a_start_whose_configuration_is_wrong_is_counted_in_the_default_journal(
    containerd: Containerd,
) -> None:
    containerd.make_bundle("c1")
    containerd.configure("[hypervisor]\nvcpu = 2\n")
    containerd.run("start", "c1")
    assert counted(Path(containerd.environment["STUB_LOG_DIR"])) == [("failure", "shim", "Refusal")]


def test_a_start_that_cannot_be_counted_says_only_why_it_failed(containerd: Containerd) -> None:
    containerd.configure('[shim]\nlog_dir = "/dev/null/log"\n')
    (containerd.make_bundle("c1") / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(containerd)


def test_a_bad_configuration_is_one_line(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.configure("[hypervisor]\nvcpu = 2\n")
    assert "unknown key 'vcpu'; the nearest valid key is 'vcpus'" in refusal(containerd)


def test_a_missing_configuration_is_one_line(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.environment["HAKO_CONFIG"] = "/nonexistent/config.toml"
    assert refusal(containerd).startswith("config: /nonexistent/config.toml: no such file;")


def test_a_spec_that_is_not_json_is_one_line(containerd: Containerd) -> None:
    (containerd.make_bundle("c1") / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(containerd)


def test_undecodable_input_is_one_line(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    assert refusal(containerd, stdin=b"\xff" * 20).startswith("start: standard input: ")


def test_endless_input_is_one_line(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    assert "more than 10485760 bytes" in refusal(containerd, stdin=b"\0" * (10 << 20 | 1))


def test_a_socket_directory_too_long_for_a_socket_is_one_line(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    sent = params("c1", socket_dir="/run/" + "s" * 60)
    assert "too long for a unix socket" in refusal(containerd, stdin=sent.SerializeToString())


def test_an_unsafe_group_is_one_line(containerd: Containerd) -> None:
    containerd.make_bundle("c1", annotations={GROUPS[0]: "../c2"})
    assert refusal(containerd).startswith("start: group '../c2': ")


@pytest.mark.parametrize("flag", ["-id", "-namespace"])
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../etc", "a\nb", "-x", "x" * 77])
def test_an_unsafe_name_is_one_line(containerd: Containerd, flag: str, name: str) -> None:
    containerd.make_bundle("c1")
    assert refusal(containerd, flags=(flag, name)).startswith(f"start: {flag[1:]}")


@pytest.mark.parametrize("version", ["1.6", "2.3"])
def test_grpc_is_refused_if_containerd_cannot_use_it(containerd: Containerd, version: str) -> None:
    containerd.make_bundle("c1")
    containerd.configure(f'[shim]\nzygote = false\nstate_dir = "{containerd.state_dir}"\nprotocol = "grpc"\n')
    stdin = b""
    if version == "1.6":
        del containerd.environment["MAX_SHIM_VERSION"]
    else:
        stdin = params("c1").SerializeToString()
    assert f"containerd {version}" in refusal(containerd, stdin=stdin)


def fake_containerd(directory: Path, module: str, version: str) -> str:
    path = directory / "containerd"
    path.write_text(f"#!/bin/sh\necho containerd {module} {version} abc\n")
    path.chmod(0o700)
    return str(path)


def test_grpc_is_refused_on_containerd_2_1(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.configure(f'[shim]\nzygote = false\nstate_dir = "{containerd.state_dir}"\nprotocol = "grpc"\n')
    binary = fake_containerd(containerd.directory, "github.com/containerd/containerd/v2", "2.1.9")
    assert "containerd 2.1.9 cannot drive a shim over grpc" in refusal(containerd, publish_binary=binary)


POD = {"io.kubernetes.cri.container-type": "sandbox"}


@pytest.mark.parametrize(
    ("containerd_version", "annotations", "version"),
    [
        ("2.1.9", POD, 3),
        ("v2.0.0", POD, 3),
        ("1.7.24", POD, 2),
        ("", POD, 2),
        ("2.1.9", {"io.kubernetes.cri.container-type": "container"}, 2),
        ("2.1.9", {}, 2),
    ],
)
def test_only_containerd_2_adds_containers_to_a_pod_without_calling_start(
    containerd: Containerd, containerd_version: str, annotations: dict[str, str], version: int
) -> None:
    containerd.make_bundle("c1", annotations=annotations)
    binary = fake_containerd(containerd.directory, "module", containerd_version)
    reply = containerd.run("start", "c1", publish_binary=binary)
    assert json.loads(reply.stdout)["version"] == version


def test_a_sandbox_without_a_spec_is_a_pod(containerd: Containerd) -> None:
    (containerd.make_bundle("c1") / "config.json").unlink()
    reply = containerd.run("start", "c1", stdin=params("c1").SerializeToString())
    assert bootstrap_v1_pb2.BootstrapResult.FromString(reply.stdout).version == 3


def test_a_container_that_joins_a_pod_gets_the_pods_protocol_version(containerd: Containerd) -> None:
    containerd.make_bundle("pod", annotations={**POD, GROUPS[1]: "pod"})
    containerd.make_bundle("member", annotations={GROUPS[1]: "pod"})
    binary = fake_containerd(containerd.directory, "module", "2.1.9")
    replies = [containerd.run("start", name, publish_binary=binary).stdout for name in ("pod", "member")]
    assert replies[0] == replies[1]


def test_containerd_1_7_gets_the_grpc_address_once_the_socket_listens(containerd: Containerd) -> None:
    bundle = containerd.make_bundle("c1")
    containerd.configure(f'[shim]\nzygote = false\nstate_dir = "{containerd.state_dir}"\nprotocol = "grpc"\n')
    binary = fake_containerd(containerd.directory, "github.com/containerd/containerd", "1.7.24~ds1")
    reply = containerd.run("start", "c1", publish_binary=binary)
    assert (reply.returncode, reply.stderr) == (0, b"")
    path = str(containerd.socket_path("c1"))
    assert json.loads(reply.stdout) == {"version": 2, "address": path, "protocol": "grpc"}
    assert (bundle / "address").read_bytes() == reply.stdout
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_daemon_that_dies_early_is_reported_with_its_last_output(
    containerd: Containerd,
) -> None:
    containerd.make_bundle("c1")
    containerd.configure(f'[shim]\nzygote = false\nstate_dir = "{containerd.state_dir}"\nprotocol = "grpc"\n')
    containerd.environment["STUB_DIES"] = "listen: no room on this host"
    binary = fake_containerd(containerd.directory, "github.com/containerd/containerd", "1.7.24")
    line = refusal(containerd, publish_binary=binary)
    assert line.startswith("start: daemon: it died before it was ready: listen: no room on this host;")


@pytest.mark.parametrize("protocol", ["ttrpc", "grpc"])
def test_containers_of_a_group_that_start_at_once_share_one_shim(
    containerd: Containerd, protocol: str
) -> None:
    containerd.configure(
        f'[shim]\nzygote = false\nstate_dir = "{containerd.state_dir}"\nprotocol = "{protocol}"\n'
    )
    binary = fake_containerd(containerd.directory, "github.com/containerd/containerd", "1.7.24")
    members = ["pod", "a", "b", "c"]
    for member in members:
        containerd.make_bundle(member, annotations={GROUPS[0]: "pod"})
    with ThreadPoolExecutor(len(members)) as pool:
        replies = list(
            pool.map(lambda member: containerd.run("start", member, publish_binary=binary), members)
        )
    assert {reply.returncode for reply in replies} == {0}
    assert len({reply.stdout for reply in replies}) == 1
    assert len(containerd.shims()) == 1


def test_a_rehearsal_leaves_nothing_behind(containerd: Containerd) -> None:
    before = sorted(containerd.directory.iterdir())
    start.rehearse(str(containerd.directory / "rehearsal"))
    assert sorted(containerd.directory.iterdir()) == before
    assert timeline.durations() == []


def test_a_rehearsal_removes_what_an_interrupted_one_has_left(containerd: Containerd) -> None:
    directory = containerd.directory / "rehearsal"
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))

    start.rehearse(str(directory))
    assert not directory.exists()
