"""The whole program: its answers, its refusals, and the modules that it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.containerd import types_pb2
from shim.bootstrap.wire import FEATURES_TYPE
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from typing import Any

    from tests.unit.shim.conftest import Containerd


ROOT = Path(__file__).parents[4]
#: Each would cost every start and delete several milliseconds.
HEAVY = {
    "argparse",
    "asyncio",
    "concurrent",
    "ctypes",
    "dataclasses",
    "email",
    "google",
    "grpc",
    "importlib.metadata",
    "inspect",
    "logging",
    "pathlib",
    "shutil",
    "subprocess",
    "tempfile",
    "threading",
    "tomllib",
    "typing",
    "urllib",
}


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not count failures on the host that runs the tests."""
    config = tmp_path / "own.toml"
    config.write_text(f'[shim]\nlog_dir = "{tmp_path}/log"\n', encoding="utf-8")
    monkeypatch.setenv("HAKO_CONFIG", str(config))


def run(
    *arguments: str, program: tuple[str, ...] = ("-m", "shim.bootstrap"), **options: Any
) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(
        [sys.executable, *program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=WITHIN_S,
        check=False,
        **options,
    )


def test_info_is_containerds_runtime_info() -> None:
    reply = run("-info")
    assert (reply.returncode, reply.stderr) == (0, b"")
    information = types_pb2.RuntimeInfo.FromString(reply.stdout)
    assert information.name == "io.containerd.hako.v2"
    assert information.version.version
    assert information.features.type_url == FEATURES_TYPE
    features = json.loads(information.features.value)
    assert features["linux"]["mountExtensions"]["idmap"]["enabled"] is False
    assert (
        "rro" in features["mountOptions"]
    )  # otherwise Kubernetes assumes that recursiveReadOnly is impossible


@pytest.mark.parametrize("flag", ["-v", "-version"])
def test_the_version_is_printed_for_people(flag: str) -> None:
    reply = run(flag)
    assert (reply.returncode, reply.stderr) == (0, b"")
    assert reply.stdout.startswith(b"containerd-shim-hako-v2:\n  Version: ")


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["-unknown"], ["-id"]])
def test_a_wrong_command_line_is_one_line(arguments: list[str]) -> None:
    reply = run(*arguments)
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert reply.stderr.startswith(b"command line: ")
    assert b"\n" not in reply.stderr


def test_a_failure_of_the_host_is_one_line(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").mkdir()
    reply = run("-namespace", "n", "-id", "c", "-address", "/a", "start", cwd=bundle)
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert b"\n" not in reply.stderr
    assert b"config.json: a directory, not a" in reply.stderr or b"root is required" in reply.stderr


def pretending(*, euid: int = 0, machine: str = "x86_64") -> tuple[str, ...]:
    script = f"""
import os, sys, types
os.uname = lambda: types.SimpleNamespace(machine={machine!r})
os.geteuid = lambda: {euid}
from shim.bootstrap.__main__ import main
sys.exit(main())
"""
    return ("-c", script)


@pytest.mark.parametrize(
    ("host", "line"),
    [
        ({"euid": 1000}, "runs as uid 1000; root is required, run containerd as root"),
        ({"machine": "riscv64"}, "its architecture is riscv64; only x86_64 is supported"),
    ],
)
def test_a_host_that_cannot_run_it_is_refused(host: dict[str, Any], line: str) -> None:
    reply = run("-namespace", "n", "-id", "c", "start", program=pretending(**host))
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert reply.stderr.decode() == f"start: host: {line}"


SITE = """
import atexit, signal, sys, types
from shim import config
config.ShimConfig.zygote = False
if sys.orig_argv[-1] in {{"start", "delete"}}:
    atexit.register(lambda: open({listing!r}, "w").write("\\n".join(sys.modules)))
else:
    sys.modules["shim.daemon"] = types.SimpleNamespace(run=lambda *_: signal.pause())
"""


def test_nothing_heavy_is_imported(containerd: Containerd, tmp_path: Path) -> None:
    listing = tmp_path / "modules"
    (tmp_path / "sitecustomize.py").write_text(SITE.format(listing=str(listing)))
    containerd.make_bundle("c1")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "MAX_SHIM_VERSION": "2"}
    environment.pop("HAKO_CONFIG", None)
    flags = ["-namespace", "tests", "-address", containerd.address, "-id", "c1"]
    for action in ("start", "delete"):
        reply = subprocess.run(
            [sys.executable, "-m", "shim.bootstrap", *flags, action],
            cwd=containerd.bundle("c1"),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert (reply.returncode, reply.stderr) == (0, b"")
        imported = set(listing.read_text().splitlines())
        assert f"shim.bootstrap.{action}" in imported
        assert {name for name in imported if name.partition(".")[0] in HEAVY or name in HEAVY} == set()
