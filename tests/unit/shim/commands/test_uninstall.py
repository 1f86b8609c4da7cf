"""``hako uninstall`` refuses while a sandbox runs; otherwise it leaves nothing."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

from shim import cli, config, zygote_protocol
from shim.commands import drop_in
from shim.commands import uninstall as uninstall_command
from shim.host import state_directory
from shim.host.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path

    from shim.host.state_directory import StartRecord


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StartRecord:
    """The state of a sandbox called box; no process serves its socket yet."""
    monkeypatch.setattr(zygote_protocol, "ZYGOTE_DIRECTORY", str(tmp_path / "run/zygote"))
    directory = tmp_path / "run/0123"
    directory.mkdir(parents=True)
    (tmp_path / "etc/conf.d").mkdir(parents=True)
    (tmp_path / "etc/conf.d/hako.toml").write_text("# Written by `hako install`\n", encoding="utf-8")
    (tmp_path / "run/templates").mkdir(mode=0o700)
    (tmp_path / "hako.toml").write_text(
        f'[shim]\nstate_dir = "{tmp_path}/run"\n[hypervisor]\ntemplate_dir = "{tmp_path}/run/templates"\n',
        encoding="utf-8",
    )
    record = state_directory.StartRecord(
        namespace="default",
        id="box",
        bundle="/b",
        grpc_address="/g",
        ttrpc_address="/t",
        publish_binary="containerd",
        config_text="",
        config_source=config.DEFAULTS,
        protocol="ttrpc",
        socket_path=str(tmp_path / "s"),
        state_directory=str(directory),
        debug=False,
        dialect="1.7",
        started_at=0.0,
    )
    state_directory.write_record(record)
    Ledger(str(directory), create=True).close()
    return record


def uninstall(tmp_path: Path, *options: str) -> int:
    main = ("--containerd-config", str(tmp_path / "etc/config.toml"))
    return cli.main(["uninstall", "--keep-image", "--config", str(tmp_path / "hako.toml"), *main, *options])


def test_a_running_sandbox_is_named_and_nothing_is_removed(
    sandbox: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as shim:
        shim.bind(sandbox.socket_path)
        shim.listen()

        assert uninstall(tmp_path) == 1
    assert "sandboxes run: box of namespace default; stop them first" in capsys.readouterr().err
    assert (tmp_path / "etc/conf.d/hako.toml").exists()


def test_a_sandbox_runs_even_if_it_is_too_slow_for_its_callers(
    sandbox: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as shim, socket.socket(socket.AF_UNIX) as caller:
        shim.bind(sandbox.socket_path)
        shim.listen(0)
        caller.connect(sandbox.socket_path)

        assert uninstall(tmp_path) == 1
    assert "sandboxes run: box of namespace default; stop them first" in capsys.readouterr().err


@pytest.mark.usefixtures("sandbox")
def test_leftovers_and_templates_and_the_drop_in_are_removed(tmp_path: Path) -> None:
    assert uninstall(tmp_path) == 0

    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "etc/conf.d/hako.toml").exists()


def test_a_running_sandbox_is_left_to_its_end_if_that_is_wanted(
    sandbox: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as shim:
        shim.bind(sandbox.socket_path)
        shim.listen()

        assert uninstall(tmp_path, "--keep-sandboxes") == 0
    assert "left to their end: box of namespace default" in capsys.readouterr().out
    assert not (tmp_path / "etc/conf.d/hako.toml").exists()
    assert (tmp_path / "run/0123/sandbox.json").exists()


def test_running_guests_keep_the_image_that_they_load_modules_from(
    sandbox: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uninstall_command, "_CACHE", tmp_path / "cache")
    for name in ("guest/modules", "cache"):
        (tmp_path / name).mkdir(parents=True)
    configuration = tmp_path / "hako.toml"
    guest = f'[guest]\nkernel = "{tmp_path}/guest/vmlinux"\n'
    configuration.write_text(configuration.read_text(encoding="utf-8") + guest, encoding="utf-8")
    argv = ["uninstall", "--keep-sandboxes", "--config", str(configuration)]
    argv += ["--containerd-config", str(tmp_path / "etc/config.toml")]
    with socket.socket(socket.AF_UNIX) as shim:
        shim.bind(sandbox.socket_path)
        shim.listen()
        assert cli.main(argv) == 0
    assert f"left: {tmp_path}/guest: running guests use it" in capsys.readouterr().out
    assert (tmp_path / "guest/modules").exists()

    assert cli.main(argv) == 0
    assert not (tmp_path / "guest").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("sandbox")
def test_a_drop_in_that_somebody_has_changed_is_left_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "etc/conf.d/hako.toml"
    written.write_text(drop_in.render("2.1.0").replace("podsandbox", "shim"), encoding="utf-8")

    assert uninstall(tmp_path) == 0
    assert f"left: {written}: somebody has changed it" in capsys.readouterr().out
    assert written.exists()


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("is_made", [True, False])
def test_the_directory_goes_if_it_was_made_for_the_drop_in(tmp_path: Path, is_made: bool) -> None:
    written = tmp_path / "etc/conf.d/hako.toml"
    written.write_text(drop_in.render("2.1.0", is_directory_made=is_made), encoding="utf-8")

    assert uninstall(tmp_path) == 0
    assert written.parent.exists() is not is_made


@pytest.mark.usefixtures("sandbox")
def test_print_removes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert uninstall(tmp_path, "--print") == 0

    assert f"would remove: {tmp_path}/run/0123\n" in capsys.readouterr().out
    assert (tmp_path / "run/0123").exists()


@pytest.mark.usefixtures("sandbox")
def test_programs_are_told_what_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = [f"{tmp_path}/{name}" for name in ("etc/conf.d/hako.toml", "run/0123", "run/templates")]

    assert uninstall(tmp_path, "--print", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(step["detail"] for step in told) == gone
    assert {step["what"] for step in told} == {"would remove"}

    assert uninstall(tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(step["detail"].partition(";")[0] for step in told) == gone
    assert {step["what"] for step in told} == {"removed"}
