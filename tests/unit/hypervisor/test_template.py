"""Which machines share a template, how a clone is started, and how its memory is copied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Accelerator, Channel, TemplateError, VmStartError, memory_copy, template_key
from hypervisor.architecture import X86_64
from hypervisor.argv import clone_argv
from hypervisor.template import (
    TemplateDescription,
    bare_descriptors,
    identity,
    open_memory,
    read_description,
    read_state,
)
from hypervisor.virtiofsd import Dialect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

    import hypervisor
    from hypervisor import interface
    from hypervisor.interface import VmSpec


GOLDEN = Path(__file__).parent / "golden"
PAGE = 4096


@pytest.fixture
def spec(make_spec: Callable[..., hypervisor.VmSpec], tmp_path: Path) -> Callable[..., VmSpec]:
    """A machine whose files exist."""

    def make(**changes: Any) -> VmSpec:
        files = {name: tmp_path / name for name in ("qemu", "kernel", "initrd")}
        for name, path in files.items():
            if not path.exists():
                path.write_text(name)
        return make_spec(**{**files, **changes})

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"directory": Path("/another")},
        {"share_source": Path("/another")},
        {"virtiofsd": Path("/another")},
        {"network_namespace": Path("/run/netns/another")},
        {"template": Path("/another")},
        {"vsock_daemon": Path("/another")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_sandboxs_own_values_are_not_in_the_key(
    spec: Callable[..., VmSpec], changes: dict[str, Path | str]
) -> None:
    assert template_key(spec(**changes)) == template_key(spec())


@pytest.mark.parametrize(
    "changes",
    [
        {"machine_options": "hpet=off"},
        {"kernel_parameters": ("loglevel=7",)},
        {"accelerator": Accelerator.KVM},
        {"vcpus": 2},
        {"max_vcpus": 8},
        {"memory_bytes": 256 << 20},
        {"max_memory_bytes": 2 << 30},
        {"root_ports": 1},
        {"channel": Channel.VHOST_USER_VSOCK},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_that_shapes_the_machine_is_in_the_key(
    spec: Callable[..., VmSpec], changes: dict[str, Any]
) -> None:
    assert template_key(spec(**changes)) != template_key(spec())


@pytest.mark.parametrize("name", ["qemu", "kernel", "initrd"])
def test_a_changed_file_changes_the_key(spec: Callable[..., VmSpec], tmp_path: Path, name: str) -> None:
    before = template_key(spec())
    (tmp_path / name).write_text("changed")
    changed = template_key(spec())
    assert changed != before
    (tmp_path / f"{name}.new").write_text("changed")
    (tmp_path / f"{name}.new").replace(tmp_path / name)
    assert template_key(spec()) != changed, "although its content is the same"


def test_under_kvm_the_processor_is_in_the_key(
    spec: Callable[..., VmSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("hypervisor.template._CPUINFO", cpuinfo)
    keys = []
    for text in (
        "model name : A\ncpu MHz : 1\n\nmodel name : A\n",
        "model name : B\n",
        "model name : A\ncpu MHz : 2\n",
    ):
        cpuinfo.write_text(text)
        keys.append(template_key(spec(accelerator=Accelerator.KVM)))
    assert keys[0] == keys[2] != keys[1]


def test_a_missing_file_is_named(spec: Callable[..., VmSpec]) -> None:
    with pytest.raises(VmStartError, match="/nonexistent/kernel: No such file"):
        template_key(spec(kernel=Path("/nonexistent/kernel")))


@pytest.mark.parametrize(
    "channel", [Channel.VIRTIO_SERIAL, Channel.VHOST_USER_VSOCK], ids=lambda each: each.value
)
def test_a_clones_command_line_matches_the_golden_file(
    make_spec: Callable[..., hypervisor.VmSpec], channel: interface.Channel
) -> None:
    port = 13 if channel is Channel.VIRTIO_SERIAL else None
    inherited = bare_descriptors(qmp=10, console=11, memory=12, agent=port)
    words = clone_argv(make_spec(channel=channel, vcpus=2), inherited, architecture=X86_64)
    assert words == (GOLDEN / f"clone-{channel.value}.txt").read_text().splitlines()


@pytest.fixture
def saved(tmp_path: Path) -> TemplateDescription:
    """Make a template's description, with files that match it."""
    (tmp_path / "daemon").touch()
    (tmp_path / "state").write_bytes(b"state")
    (tmp_path / "memory").write_bytes(bytes(PAGE))
    os.utime(tmp_path / "memory", ns=(1, 1))  # in the past: times of files are coarse
    description = TemplateDescription(
        qemu_version="7.2.0",
        memory_bytes=PAGE,
        data_bytes=0,
        memory_written_ns=1,
        state_bytes=5,
        state_sha256="c0b057f584795eff8b06d5e420e71d747587d20de836f501921fd1b5741f1283",
        virtiofsd=identity(tmp_path / "daemon"),
        virtiofsd_dialect="rust",
    )
    description.write(tmp_path)
    return description


def test_a_description_survives_a_round_trip(saved: TemplateDescription, tmp_path: Path) -> None:
    assert read_description(tmp_path) == saved
    os.close(open_memory(tmp_path, saved))


def test_a_daemons_dialect_is_known_until_the_daemon_changes(
    saved: TemplateDescription, tmp_path: Path
) -> None:
    assert saved.dialect_of(tmp_path / "daemon") is Dialect.RUST
    (tmp_path / "daemon").write_text("changed")
    assert saved.dialect_of(tmp_path / "daemon") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '"format"', '{"format": 1}', '{"format": 2, "else": 1}'])
def test_a_malformed_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "template.json").write_text(text)
    with pytest.raises(TemplateError, match=r"template\.json: "):
        read_description(tmp_path)


def test_a_value_of_another_type_is_refused(saved: TemplateDescription, tmp_path: Path) -> None:
    path = tmp_path / "template.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "memory_bytes": "4096"}))
    with pytest.raises(TemplateError, match="wrong type"):
        read_description(tmp_path)


def test_a_state_with_changed_content_is_refused(saved: TemplateDescription, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"statf")
    with pytest.raises(TemplateError, match="checksum"):
        read_state(tmp_path, saved)


def test_a_memory_file_that_was_written_to_is_refused(saved: TemplateDescription, tmp_path: Path) -> None:
    with (tmp_path / "memory").open("r+b") as memory:
        memory.write(b"1")
    with pytest.raises(TemplateError, match="memory: changed since it was saved"):
        open_memory(tmp_path, saved)


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[tuple[BinaryIO, BinaryIO, Path]]:
    """A file with data in two places of many, and an empty one of its length."""
    content = {0: b"first" * 1000, 700 * PAGE: b"second"}
    size = 1000 * PAGE
    with (tmp_path / "sparse").open("w+b") as source, (tmp_path / "target").open("w+b") as target:
        for file in (source, target):
            file.truncate(size)
        for offset, data in content.items():
            os.pwrite(source.fileno(), data, offset)
        yield source, target, tmp_path


def test_only_data_is_copied(sparse: tuple[BinaryIO, BinaryIO, Path]) -> None:
    source, target, directory = sparse
    copied = memory_copy.copy(source.fileno(), target.fileno())
    assert 3 * PAGE <= copied < 100 * PAGE
    assert (directory / "target").read_bytes() == (directory / "sparse").read_bytes()
    assert (directory / "target").stat().st_blocks * 512 < 200 * PAGE


@pytest.mark.parametrize(("wanted", "complaint"), [(3 * PAGE, ""), (1 << 30, "bytes of data instead of")])
def test_the_copier_reports_missing_data(
    sparse: tuple[BinaryIO, BinaryIO, Path], wanted: int, complaint: str
) -> None:
    source, target, _directory = sparse
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            memory_copy.__file__,
            *map(str, (source.fileno(), target.fileno(), wanted)),
        ],
        pass_fds=(source.fileno(), target.fileno()),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert complaint in done.stderr
    assert (done.returncode == 0) is (complaint == "")
