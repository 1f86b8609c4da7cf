"""``hako`` on a host that consists of small scripts."""

from __future__ import annotations

import argparse
import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.image import ImageError
from shim import cli, config
from shim.commands.image import Progress
from shim.machine import host_choice
from shim.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


ROOT = Path(__file__).parents[3]


@pytest.fixture
def able_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a host that has everything; return its configuration file."""
    programs = {
        "containerd": "echo containerd github.com/containerd/containerd 1.7.24~ds1 abc",
        "qemu": "echo 'QEMU emulator version 7.2.22 (Debian)'",
        "virtiofsd": "echo '  --shared-dir DIR'",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o700)
    for name in ("kernel", "initrd"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(host_choice, "_DAEMON_DIRECTORIES", ())
    monkeypatch.setattr("os.geteuid", lambda: 0)
    path = tmp_path / "config.toml"
    path.write_text(f"""
[hypervisor]
qemu = "{tmp_path}/qemu"
accelerator = "tcg"
channel = "virtio-serial"
virtiofsd = "{tmp_path}/virtiofsd"
[guest]
kernel = "{tmp_path}/kernel"
initrd = "{tmp_path}/initrd"
""")
    return path


def test_a_complete_host_gets_a_line_for_each_requirement(
    able_host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--config", str(able_host)]) == 0
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if not line.strip().startswith("warning: ")]
    assert all(line.startswith("ok ") for line in lines[:-1])
    names = [line.split()[1] for line in lines[:-1]]
    assert names == [
        "user",
        "architecture",
        "containerd",
        "qemu",
        "accelerator",
        "jail",
        "channel",
        "virtiofsd",
        "network",
        "guest",
    ]
    assert lines[-1] == "This host can run sandboxes."


@pytest.mark.parametrize(
    ("accelerator", "warning"),
    [
        ("kvm", "warning: KVM is nested; KVM has no nested paging"),
        (
            "tcg",
            "warning: QEMU does not count emulation as a boundary that holds a hostile guest; use a host",
        ),
    ],
)
def test_a_warning_is_shown_and_does_not_fail_the_check(
    able_host: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    warning: str,
) -> None:
    monkeypatch.setattr(
        "shim.commands.check.weaknesses", lambda: ["KVM is nested", "KVM has no nested paging"]
    )
    able_host.write_text(able_host.read_text().replace('"tcg"', f'"{accelerator}"'))
    assert cli.main(["check", "--config", str(able_host)]) == 0
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limits", "remedies"),
    [
        ((20_000, 40_000), ["(LimitNOFILE)"]),
        ((200_000, 399_999), ["fs.file-max"]),
        ((200_000, 400_000), []),
    ],
)
def test_check_warns_if_file_servers_may_open_few_files_or_those_of_the_whole_host(
    able_host: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    remedies: list[str],
) -> None:
    limit, of_all = limits
    monkeypatch.setattr("shim.host.kernel_limits.most_open_files", lambda: limit)
    monkeypatch.setattr("shim.host.kernel_limits.most_open_by_all", lambda: of_all)
    assert cli.main(["check", "--config", str(able_host)]) == 0
    output = capsys.readouterr().out
    assert (f"warning: it may open {limit} files" in output) == bool(remedies)
    assert [one for one in ("(LimitNOFILE)", "fs.file-max") if one in output] == remedies


@pytest.mark.parametrize(
    ("node", "moved"),
    [
        ("/dev/null", "by the kernel (vhost-net)"),
        ("/dev/nope", "by QEMU (/dev/nope: No such file or directory; "),
    ],
)
def test_check_shows_which_program_moves_packets(
    able_host: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    moved: str,
) -> None:
    monkeypatch.setattr("hypervisor.nics._VHOST_NET", Path(node))
    assert cli.main(["check", "--config", str(able_host)]) == 0
    assert f"packets are moved {moved}" in capsys.readouterr().out


def test_versions_and_choices_are_shown(able_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "--json", "--config", str(able_host)])
    report = json.loads(capsys.readouterr().out)
    assert report["able"] is True
    details = {finding["name"]: finding["detail"] for finding in report["findings"]}
    directory = able_host.parent
    assert details["containerd"] == f"{directory}/containerd, version 1.7.24~ds1"
    assert details["qemu"] == f"{directory}/qemu, version 7.2.22 (Debian)"
    assert details["virtiofsd"] == f"{directory}/virtiofsd, the Rust daemon"
    assert details["accelerator"].startswith("tcg: ")
    assert details["channel"].startswith("virtio-serial: ")


@pytest.mark.parametrize(
    ("missing", "name", "remedy"),
    [
        ("qemu", "qemu", "install qemu-system-x86 or set [hypervisor] qemu"),
        ("virtiofsd", "virtiofsd", "install virtiofsd or set [hypervisor] virtiofsd"),
        ("kernel", "guest", "run `hako install` or `hako image build`, or set [guest] kernel"),
        ("initrd", "guest", "run `hako install` or `hako image build`, or set [guest] initrd"),
    ],
)
def test_one_missing_requirement_fails_the_check(
    able_host: Path, capsys: pytest.CaptureFixture[str], missing: str, name: str, remedy: str
) -> None:
    (able_host.parent / missing).unlink()
    assert cli.main(["check", "--json", "--config", str(able_host)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["able"] is False
    [finding] = [finding for finding in report["findings"] if not finding["ok"]]
    assert (finding["name"], finding["remedy"]) == (name, remedy)
    assert finding["detail"]


def test_a_missing_requirement_is_one_line_with_its_remedy(
    able_host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (able_host.parent / "kernel").unlink()
    assert cli.main(["check", "--config", str(able_host)]) == 1
    lines = capsys.readouterr().out.splitlines()
    path = able_host.parent / "kernel"
    remedy = "run `hako install` or `hako image build`, or set [guest] kernel"
    line = f"no guest         guest kernel {path}: no such file; {remedy}"
    assert [wrong for wrong in lines if wrong.startswith("no ")] == [line]
    assert lines[-1] == "This host cannot run sandboxes."


def test_a_missing_containerd_fails_the_check(
    able_host: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (able_host.parent / "containerd").unlink()
    monkeypatch.setenv("PATH", str(able_host.parent))
    assert cli.main(["check", "--config", str(able_host)]) == 1
    assert "containerd: not found in PATH; install containerd 1.6 or later" in capsys.readouterr().out


def test_a_containerd_that_cannot_run_fails_the_check(
    able_host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (able_host.parent / "containerd").write_text("#!/bin/sh\nexit 3\n")
    assert cli.main(["check", "--config", str(able_host)]) == 1
    assert "containerd --version: exit status 3; reinstall it" in capsys.readouterr().out


def test_check_refuses_a_user_other_than_root(
    able_host: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert cli.main(["check", "--config", str(able_host)]) == 1
    assert "runs as uid 1000; run containerd and this as root" in capsys.readouterr().out


def test_a_bad_configuration_is_one_line(able_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    able_host.write_text("[shim]\nstate = '/x'\n")
    assert cli.main(["check", "--config", str(able_host)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "unknown key 'state'; the nearest valid key is 'state_dir'" in output.err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["image"]])
def test_a_wrong_command_line_has_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: hako" in capsys.readouterr().err


def leaves(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands that do something, with their names."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for word, each in action.choices.items():
            yield from leaves(each, f"{name} {word}".strip())


@pytest.mark.parametrize("name", sorted(dict(leaves(cli.parser()))))
def test_every_command_speaks_to_programs(name: str) -> None:
    command = dict(leaves(cli.parser()))[name]
    assert "--json" in command.format_help()


def test_building_an_image_passes_on_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def build(
        output: Path, cache: Path, *, kernel: Path, modules: Path, progress: Callable[..., Any]
    ) -> None:
        asked.update(output=output, cache=cache, kernel=kernel, modules=modules)
        progress("packing")

    monkeypatch.setattr("guest.image.build", build)
    given = {name: tmp_path / name for name in ("output", "cache", "kernel", "modules")}
    arguments = [argument for name, path in given.items() for argument in (f"--{name}", str(path))]
    assert cli.main(["image", "build", *arguments]) == 0
    assert asked == given
    output = capsys.readouterr()
    assert (output.out, output.err) == (f"{tmp_path}/output\n", "packing\n")
    assert cli.main(["image", "build", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": f"{tmp_path}/output"}


def test_an_image_that_cannot_be_built_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Path, progress: Callable[..., Any], **__: None) -> None:
        raise ImageError("image: kernel: unreadable; choose another")

    monkeypatch.setattr("guest.image.build", build)
    assert cli.main(["image", "build", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "image: kernel: unreadable; choose another\n"


@pytest.mark.parametrize(
    ("redirection", "status", "told"),
    [
        ("| head -0", 0, ""),
        ("> /dev/full", 1, "version: the output: No space left on device; correct that, and run it again\n"),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback(redirection: str, status: int, told: str) -> None:
    command = f"{sys.executable} -m shim.cli version {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, told)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (BrokenPipeError(), 0, ""),
        (KeyboardInterrupt(), 130, ""),
        (Refusal("ps: no"), 1, "ps: no\n"),
        (
            FileNotFoundError(2, "No such file", "/x"),
            1,
            "ps: /x: No such file; correct that, and run it again\n",
        ),
    ],
)
def test_an_error_of_a_task_is_told_as_that_of_a_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    told: str,
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise BaseExceptionGroup("outer", [BaseExceptionGroup("inner", [error]), ValueError()])

    monkeypatch.setattr("shim.commands.ps.run", run)
    monkeypatch.setattr("shim.cli._drop_output", lambda: None)
    assert cli.main(["ps"]) == status
    assert capsys.readouterr().err == told


def test_an_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "/no\n\x1b[31mfile"]) == 1
    assert capsys.readouterr().err == (
        "config: /no  [31mfile: no such file; correct the path or create the file\n"
    )


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Path, progress: Callable[..., Any], **__: None) -> None:
        (tmp_path / "no" / "place").mkdir()

    monkeypatch.setattr("guest.image.build", build)
    assert cli.main(["image", "build"]) == 1
    told = f"image: {tmp_path}/no/place: No such file or directory; correct that, and run it again\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("words", "usage"), [("ps one two", "hako ps"), ("template ls --al", "hako template ls")]
)
def test_a_wrong_command_line_shows_the_usage_of_its_command(
    capsys: pytest.CaptureFixture[str], words: str, usage: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"usage: {usage} [")
    assert (
        f"{usage}: error: unrecognized arguments: {' '.join(words.split()[len(usage.split()) - 1 :])}" in told
    )


@pytest.mark.parametrize(
    ("user", "rest"), [(0, "correct that, and run it again"), (1000, "run this as root")]
)
def test_a_user_who_may_not_do_it_is_told_who_may(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    user: int,
    rest: str,
) -> None:
    def build(*_: Path, progress: Callable[..., Any], **__: None) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr("guest.image.build", build)
    assert cli.main(["image", "build"]) == 1
    assert capsys.readouterr().err == f"image: {tmp_path}: Permission denied; {rest}\n"


def test_progress_on_a_terminal_stays_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = Progress(terminal)
    progress.step("one")
    progress.step("two")
    progress.end()
    assert terminal.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\n"


def config_with(tmp_path: Path, text: str) -> str:
    path = tmp_path / "given.toml"
    path.write_text(text)
    return str(path)


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "explain"]) == 0

    text = capsys.readouterr().out
    for section, kind in config.SECTIONS.items():
        for key in kind.KEYS:
            assert f"{section}.{key} = " in text


@pytest.mark.parametrize("name", ["memory_mib", "hypervisor.memory_mib"])
def test_a_key_is_explained_by_its_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(["config", "explain", name]) == 0
    assert capsys.readouterr().out.startswith("hypervisor.memory_mib = 512\n  takes 128 to 16777216 MiB\n")


def test_an_unknown_key_is_not_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "explain", "memory"]) == 1
    assert "no key 'memory'; `hako config explain` lists all" in capsys.readouterr().err


def test_a_valid_file_is_reported_as_valid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = config_with(tmp_path, "[hypervisor]\nvcpus = 2\n")
    assert cli.main(["config", "check", path]) == 0
    assert capsys.readouterr().out == f"{path}: valid\n"


def test_a_wrong_file_is_refused_with_its_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = config_with(tmp_path, "[hypervisor]\nvcpu = 2\n")
    assert cli.main(["config", "check", path]) == 1
    assert "the nearest valid key is 'vcpus'" in capsys.readouterr().err


def test_traces_that_could_not_be_sent_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_with(tmp_path, '[shim]\ntracing_endpoint = "http://127.0.0.1:4318/v1/traces"\n')
    assert cli.main(["config", "check", path]) == 0

    monkeypatch.setattr("shim.telemetry.trace_export.MODULES", ("opentelemetry.gone",))
    assert cli.main(["config", "check", path]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"config: {path}: [shim] tracing_endpoint: OpenTelemetry is not installed; ")


def test_the_effective_configuration_is_shown_with_its_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = config_with(tmp_path, "[hypervisor]\nvcpus = 2\n")
    assert cli.main(["config", "show", "--config", path, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["hypervisor.vcpus"] == {"value": 2, "source": path}
    assert shown["hypervisor.memory_mib"] == {"value": 512, "source": "default"}


def test_the_effective_configuration_is_shown_in_columns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = config_with(tmp_path, "[hypervisor]\nvcpus = 2\n")
    assert cli.main(["config", "show", "--config", path]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    first, last = heading.index("FROM"), heading.index("VALUE")
    assert {line[first:last].rstrip() for line in lines} == {path, "default"}
    assert {line[last:] for line in lines if line.startswith("hypervisor.vcpus ")} == {"2"}
