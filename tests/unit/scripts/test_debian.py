"""The parts of the Debian package that need no wheel."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from scripts.debian import commands, completion, control, manual, package
from shim import cli, config
from shim.host import releases
from tests.waiting import until

HAKO = commands.described(cli.parser())


def test_every_command_and_option_is_in_the_manual() -> None:
    text = manual.hako(HAKO, version="1.2.3").replace("\\-", "-")

    for command in HAKO.all():
        if not command.commands:
            assert f".SS {' '.join(command.words)}\n" in text
        for argument in command.arguments:
            if "--help" not in argument.flags:
                assert all(flag in text for flag in argument.flags)


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
@pytest.mark.parametrize("page", [manual.hako(HAKO, version="1.2.3"), manual.shim(version="1.2.3")])
def test_a_page_is_formatted_without_a_warning(page: str) -> None:
    argv = ["groff", "-man", "-Tutf8", "-ww", "-z"]
    done = subprocess.run(argv, input=page, capture_output=True, text=True, check=True)

    assert done.stderr == ""


ZSH_SETTINGS = """
PS1='READY '
fpath=({place} $fpath)
autoload -U compinit
compinit -u -D
show() {{ print -r -- "$BUFFER" >{place}/shown; exit }}
zle -N show
bindkey '^O' complete-word '^B' show
"""


def completed_by_bash(place: Path, line: str) -> list[str]:
    """Ask bash for completions of the last word."""
    script = place / "hako"
    script.write_text(completion.bash(HAKO), encoding="utf-8")
    words = line.split(" ")
    program = f"""
        compopt() {{ COMPREPLY+=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}")); }}
        source {script}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
        _hako; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["/usr/bin/bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def completed_by_fish(place: Path, line: str) -> list[str]:
    """Ask fish for completions of the last word; it describes each after a tab."""
    script = place / "hako.fish"
    script.write_text(completion.fish(HAKO), encoding="utf-8")
    argv = ["fish", "--no-config", "--command", f"source {script}; complete --do-complete '{line}'"]
    done = subprocess.run(argv, env={**os.environ, "HOME": str(place)}, capture_output=True, check=True)
    assert done.stderr == b""
    return [each.partition("\t")[0] for each in done.stdout.decode().splitlines()]


def completed_by_zsh(place: Path, line: str) -> list[str]:
    """Have zsh complete a line on a terminal; return its last word."""
    (place / "_hako").write_text(completion.zsh(HAKO), encoding="utf-8")
    (place / ".zshrc").write_text(ZSH_SETTINGS.format(place=place), encoding="utf-8")
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "dumb", "ZDOTDIR": str(place)}
    argv = ["setsid", "--ctty", "zsh", "-d", "-i"]
    with subprocess.Popen(argv, env=environment, stdin=slave, stdout=slave, stderr=slave):
        os.close(slave)
        shown = b""
        while b"READY" not in shown:
            shown += os.read(master, 4096)
        os.write(master, f"{line}\x0f\x02".encode())
        with contextlib.suppress(OSError):  # the terminal's end
            while os.read(master, 4096):
                pass
    os.close(master)
    return (place / "shown").read_text(encoding="utf-8").split()[-1:]


COMPLETED = {"bash": completed_by_bash, "zsh": completed_by_zsh, "fish": completed_by_fish}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hako inst", ["install"]),
        ("hako template b", ["build"]),
        ("hako config expl", ["explain"]),
        ("hako template build --b", ["--background"]),
        ("hako image build --out", ["--output"]),
        ("hako logs --fol", ["--follow"]),
        ("hako check --config {place}/some", ["{place}/some-file"]),
        ("hako config check {place}/some", ["{place}/some-file"]),
    ],
)
@pytest.mark.parametrize("shell", COMPLETED)
def test_a_shell_completes_commands_options_and_files(
    tmp_path: Path, shell: str, line: str, expected: list[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "some-file").touch()

    found = COMPLETED[shell](tmp_path, line.format(place=tmp_path))
    assert found == [each.format(place=tmp_path) for each in expected]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completions_for_other_shells_have_every_command_and_option(shell: str) -> None:
    text = {"zsh": completion.zsh, "fish": completion.fish}[shell](HAKO)

    for command in HAKO.all():
        assert " ".join(command.words) in text
        for argument in command.arguments:
            for flag in argument.flags:
                assert (flag if shell == "zsh" else f" {flag.lstrip('-')} ") in text


def test_what_a_command_does_is_said_in_few_words() -> None:
    assert all(0 < len(command.summary) < 80 for command in HAKO.all() if command is not HAKO)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A host whose package dpkg has just removed, but for a release, its data and its configuration."""
    for name in ("lib/1.2.3-0/bin", "data/lib", "data/cache", "data/log", "etc/config.d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib/current").symlink_to("1.2.3-0")
    (tmp_path / "lib/1.2.3-0/bin/python").symlink_to("/usr/bin/sleep")
    return tmp_path


def after_removal(host: Path, action: str) -> str:
    """Run the script that dpkg runs after a removal, in a host below a directory."""
    script = control.scripts(version="1.2.3", release="1.2.3-0")["postrm"]
    places = {f"/var/{name}/hako": host / f"data/{name}" for name in ("lib", "cache", "log")}
    for path, place in {**places, "/usr/lib/hako": host / "lib", "/etc/hako": host / "etc"}.items():
        script = script.replace(path, str(place))
    argv = ["/bin/sh", "-c", script, "postrm", action]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def left(host: Path) -> set[str]:
    return {str(path.relative_to(host)) for path in host.rglob("*")}


def test_a_removal_keeps_data_and_configuration(installed: Path) -> None:
    assert after_removal(installed, "remove") == ""
    assert left(installed) == {"data", "data/lib", "data/cache", "data/log", "etc", "etc/config.d"}

    after_removal(installed, "purge")
    assert left(installed) == {"data"}


def test_a_purge_keeps_what_the_operator_has_written(installed: Path) -> None:
    (installed / "etc/config.toml").touch()
    after_removal(installed, "purge")

    assert left(installed) == {"data", "etc", "etc/config.toml"}


def test_a_purge_leaves_what_running_sandboxes_need_to_the_last_of_them(installed: Path) -> None:
    with subprocess.Popen([installed / "lib/1.2.3-0/bin/python", "60"]) as process:
        try:
            until(lambda: b"1.2.3-0" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
            said = after_removal(installed, "purge")
        finally:
            process.kill()
    data = [str(installed / f"data/{name}") for name in ("lib", "cache", "log")]

    assert said == f"hako: sandboxes run; the last one removes {' '.join(data)} when it ends\n"
    assert (installed / "lib" / releases.PURGED).read_text().splitlines() == data
    assert left(installed) >= {"lib/1.2.3-0/bin/python", "data/lib", "data/log"}

    assert releases.prune(str(installed / "lib"), wait_s=0) == ["1.2.3-0"]
    assert left(installed) == {"data"}


def test_other_actions_of_dpkg_remove_nothing(installed: Path) -> None:
    before = left(installed)
    after_removal(installed, "upgrade")

    assert left(installed) == before


@pytest.mark.parametrize("name", ["postinst", "prerm", "postrm"])
def test_a_script_of_the_package_is_valid_posix_shell(name: str, tmp_path: Path) -> None:
    script = tmp_path / name
    script.write_text(control.scripts(version="1.2.3", release="1.2.3-0")[name], encoding="utf-8")

    subprocess.run(["/bin/sh", "-n", script], check=True)


def test_guests_can_run_what_loads_modules_of_a_shipped_image(tmp_path: Path) -> None:
    for name in ("image.json", "vmlinux", "modules/modprobe", "modules/6.1/virtio.ko"):
        (tmp_path / "guest" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "guest" / name).touch()
    tree = tmp_path / "tree"
    package._copy_guest(tmp_path / "guest", tree)
    package._set_times(tree)

    executable = {path.name for path in tree.rglob("*") if path.is_file() and path.stat().st_mode & 0o111}
    assert executable == {"modprobe"}


def test_the_example_configuration_names_every_key_and_changes_nothing() -> None:
    text = package.example_configuration()

    assert config.parse(config.ConfigText(text=text, source="example")) == config.Config()
    uncommented = "\n".join(
        line[1:] if line[:1] == "#" and line[1:2] != " " else line for line in text.splitlines()
    )
    document = tomllib.loads(uncommented)
    assert {name: set(table) for name, table in document.items()} == {
        name: set(section.KEYS) for name, section in config.SECTIONS.items()
    }
