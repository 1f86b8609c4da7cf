"""``hako install`` writes only what containerd will read, and keeps every setting that it read before."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING

import pytest

from shim import cli
from shim.commands import containerd_config, docker, kubernetes
from shim.commands.install import copy_image

if TYPE_CHECKING:
    from pathlib import Path

# Reads files as containerd 1.7 does: an imported file's table of a plugin replaces those of other files.
CONTAINERD = """#!/usr/bin/python3
import glob, json, sys, tomllib
if sys.argv[1:] == ["--version"]:
    print("containerd github.com/containerd/containerd v1.7.24 abc")
    sys.exit()
document = {}
if sys.argv[1] == "--config":
    document = tomllib.load(open(sys.argv[2], "rb"))
    for pattern in document.get("imports", []):
        for path in sorted(glob.glob(pattern)):
            document.setdefault("plugins", {}).update(tomllib.load(open(path, "rb")).get("plugins", {}))
plugin = document.setdefault("plugins", {}).setdefault("io.containerd.grpc.v1.cri", {})
runc = {"runtime_type": "io.containerd.runc.v2"}
plugin.setdefault("containerd", {}).setdefault("runtimes", {"runc": runc})
sys.path.insert(0, ROOT)
from shim.commands.containerd_config import tables
print("\\n".join(tables(("plugins",), document["plugins"])))
"""
CNI = '[plugins."io.containerd.grpc.v1.cri".cni]\nbin_dir = "/opt/cni"\n'


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from scripts.document import ROOT

    monkeypatch.setattr(docker, "missing", lambda: "")  # this machine may have Docker

    program = tmp_path / "containerd"
    program.write_text(CONTAINERD.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    program.chmod(0o755)
    return tmp_path


def install(node: Path, *options: str) -> int:
    main = ["--containerd-config", str(node / "config.toml")]
    return cli.main(["install", "--no-image", "--containerd", str(node / "containerd"), *main, *options])


def importing(node: Path, text: str = "") -> Path:
    main = node / "config.toml"
    main.write_text(f'version = 2\nimports = ["{node}/conf.d/*.toml"]\n{text}', encoding="utf-8")
    return main


def test_it_writes_what_containerd_reads_and_keeps_other_settings(node: Path) -> None:
    main = importing(node, CNI)
    before = main.read_text(encoding="utf-8")

    assert install(node) == 0

    plugin = tomllib.loads((node / "conf.d/hako.toml").read_text(encoding="utf-8"))["plugins"]
    assert plugin["io.containerd.grpc.v1.cri"]["cni"] == {"bin_dir": "/opt/cni"}
    assert "hako" in plugin["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert "runc" in plugin["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert main.read_text(encoding="utf-8") == before


def test_a_second_install_changes_nothing(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importing(node, CNI)
    install(node)
    capsys.readouterr()

    assert install(node) == 0
    assert capsys.readouterr().out == f"unchanged: {node}/conf.d/hako.toml\n"


def test_a_main_file_that_imports_nothing_is_one_line(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (node / "config.toml").write_text("version = 2\n", encoding="utf-8")

    assert install(node) == 1
    assert f'put the line `imports = ["{node}/conf.d/*.toml"]`' in capsys.readouterr().err
    assert not (node / "conf.d").exists()


def test_it_refuses_to_hide_a_setting_of_another_file(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importing(node)
    (node / "conf.d").mkdir()
    (node / "conf.d/cni.toml").write_text(CNI, encoding="utf-8")

    assert install(node) == 1
    assert "containerd would read other files' settings otherwise" in capsys.readouterr().err
    assert not (node / "conf.d/hako.toml").exists()


def test_a_file_that_hako_did_not_write_is_left_alone(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importing(node)
    (node / "conf.d").mkdir()
    (node / "conf.d/hako.toml").write_text("version = 2\n", encoding="utf-8")

    assert install(node) == 1
    assert "move it away" in capsys.readouterr().err
    assert (node / "conf.d/hako.toml").read_text(encoding="utf-8") == "version = 2\n"


def test_a_drop_in_that_somebody_has_changed_is_left_alone(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importing(node)
    install(node)
    changed = (node / "conf.d/hako.toml").read_text(encoding="utf-8").replace('"io.hako.*", ', "")
    (node / "conf.d/hako.toml").write_text(changed, encoding="utf-8")

    assert install(node) == 1
    assert "somebody has changed it since" in capsys.readouterr().err
    assert (node / "conf.d/hako.toml").read_text(encoding="utf-8") == changed


def test_the_file_of_an_older_release_is_replaced(node: Path) -> None:
    importing(node)
    (node / "conf.d").mkdir()
    (node / "conf.d/hako.toml").write_text("# Written by `hako install`\nversion = 2\n", encoding="utf-8")

    assert install(node) == 0
    assert "runtimes.hako" in (node / "conf.d/hako.toml").read_text(encoding="utf-8")


def test_print_changes_nothing(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importing(node)

    assert install(node, "--print") == 0
    assert capsys.readouterr().err == f"install: would write this as {node}/conf.d/hako.toml\n"
    assert not (node / "conf.d").exists()


def test_programs_are_told_what_is_written(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importing(node)
    drop_in = node / "conf.d/hako.toml"
    told = []
    for options in (("--print", "--json"), ("--json",), ("--json",)):
        assert install(node, *options) == 0
        told.append(json.loads(capsys.readouterr().out))

    assert [set(each) for each in told] == [{"path", "changed", "text", "notes"}] * 3
    assert {each["path"] for each in told} == {str(drop_in)}
    assert [each["changed"] for each in told] == [True, True, False]
    assert {each["text"] for each in told[1:]} == {drop_in.read_text(encoding="utf-8")}
    assert tomllib.loads(told[0]["text"]) == tomllib.loads(told[1]["text"])


@pytest.mark.parametrize(("accelerator", "code_mib"), [("kvm", 0), ("tcg", 128)])
def test_kubernetes_is_told_the_overhead_of_the_configured_machine(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    code_mib: int,
) -> None:
    chosen = tmp_path / "hako.toml"
    text = f'[hypervisor]\nmemory_mib = 1024\naccelerator = "{accelerator}"\n'
    chosen.write_text(text, encoding="utf-8")
    monkeypatch.setenv("HAKO_CONFIG", str(chosen))
    memory = f"{1024 + kubernetes.HOST_MIB + code_mib}Mi"

    assert cli.main(["install", "--kubernetes"]) == 0
    shown = capsys.readouterr().out
    assert f"memory: {memory}" in shown
    assert ("128 because this node emulates" in shown) == (accelerator == "tcg")
    assert cli.main(["install", "--kubernetes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["handler"]) == ("RuntimeClass", "hako")
    assert told["overhead"] == {"podFixed": {"memory": memory, "cpu": f"{kubernetes.HOST_MILLICPUS}m"}}


@pytest.mark.parametrize(
    "value", ['"', "\\", "\n", "é", True, 3, 1.5, ["a", 1], [{"b": "c"}], {}, {"x y": {"z": 1}}]
)
def test_a_table_survives_a_round_trip(value: object) -> None:
    document = {"plugins": {"a.b": {"key": value}}}

    written = "\n".join(containerd_config.tables(("plugins",), document["plugins"]))

    assert tomllib.loads(written) == json.loads(json.dumps(document))


def test_a_shipped_image_replaces_another_and_leaves_the_same_modules_to_machines(tmp_path: Path) -> None:
    shipped, output = tmp_path / "shipped", tmp_path / "guest"
    (shipped / "modules/6.1").mkdir(parents=True)
    for name in ("vmlinux", "initrd", "image.json", "modules/6.1/virtio.ko"):
        (shipped / name).write_text(f"first {name}", encoding="utf-8")
    copy_image(shipped, output)
    used = (output / "modules").stat().st_ino

    (shipped / "initrd").write_text("second", encoding="utf-8")
    (shipped / "image.json").write_text("second", encoding="utf-8")
    copy_image(shipped, output)

    assert (output / "modules").stat().st_ino == used
    assert (output / "initrd").read_text(encoding="utf-8") == "second"
    assert {path.name for path in output.iterdir()} == {"vmlinux", "initrd", "image.json", "modules"}
