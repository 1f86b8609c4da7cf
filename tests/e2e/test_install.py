"""Each containerd takes what ``hako install`` writes beside any main file, and nothing else changes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from shim import cli
from shim.commands import containerd_config, drop_in
from tests.e2e.containerd import RELEASES, SHIM_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.containerd import Release

DEBIAN = """
[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"""
KUBEADM = """
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "registry.example/pause:3"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
"""
THIRD = """
[plugins."io.containerd.cri.v1.images"]
snapshotter = "native"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = true
"""
DEFAULT = "containerd's own"
OTHER = '[plugins."io.containerd.gc.v1.scheduler"]\ndeletion_threshold = 7\n'


CASES = {
    "2-empty": (2, ""),
    "2-debian": (2, DEBIAN),
    "2-kubeadm": (2, KUBEADM),
    "3-empty": (3, ""),
    "3-runc": (3, THIRD),
    "default": (2, DEFAULT),
}


def reads(release: Release, *, number: int) -> bool:
    """Tell whether a containerd reads a main file of a version: each reads those up to its own."""
    return number <= release.config_version


@pytest.fixture(params=RELEASES, ids=lambda release: release.name)
def release(request: pytest.FixtureRequest) -> Release:
    found: Release = request.param
    return found


@pytest.fixture
def install(release: Release, tmp_path: Path) -> Callable[..., int]:
    """Run the command for the containerd whose main file is in the test's directory."""

    def install(*options: str) -> int:
        program = str(release.programs / "containerd")
        main = str(tmp_path / "config.toml")
        return cli.main(
            ["install", "--no-image", "--containerd", program, "--containerd-config", main, *options]
        )

    return install


def main_file(place: Path, text: str, *, number: int = 2, imports: str | None = None) -> Path:
    line = f'imports = ["{place}/conf.d/*.toml"]\n' if imports is None else imports
    main = place / "config.toml"
    main.write_text(f"version = {number}\n{line}{text}", encoding="utf-8")
    return main


def dumped(release: Release, main: Path) -> dict[str, object]:
    return containerd_config.dump(str(release.programs / "containerd"), main)


@pytest.mark.parametrize(
    ("release", "number", "text"),
    [
        pytest.param(release, number, text, id=f"{release.name}-{name}")
        for release in RELEASES
        for name, (number, text) in CASES.items()
        if reads(release, number=number)
    ],
    indirect=["release"],
)
def test_the_runtime_is_added_and_nothing_else_changes(
    release: Release, tmp_path: Path, install: Callable[..., int], number: int, text: str
) -> None:
    if text == DEFAULT:
        argv = [str(release.programs / "containerd"), "config", "default"]
        text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        main = tmp_path / "config.toml"
        line = f'imports = ["{tmp_path}/conf.d/*.toml"]'
        lines = ["" if each.startswith("imports =") else each for each in text.splitlines()]
        main.write_text("\n".join([line, *lines]), encoding="utf-8")
    else:
        main = main_file(tmp_path, text, number=number)
    said, before = main.read_text(encoding="utf-8"), dumped(release, main)

    assert install() == 0

    after = dumped(release, main)
    plugin = drop_in.native_format({"1.6": "1.6.0", "1.7": "1.7.0"}.get(release.name, "2.1.0")).plugin
    assert containerd_config.take_out(before, plugin, "hako") is None
    handler = containerd_config.take_out(after, plugin, "hako")
    assert isinstance(handler, dict)
    assert handler["runtime_type"] == "io.containerd.hako.v2"
    assert after == before
    written = (tmp_path / drop_in.NAME).read_text(encoding="utf-8")
    assert install() == 0
    assert (tmp_path / drop_in.NAME).read_text(encoding="utf-8") == written
    assert main.read_text(encoding="utf-8") == said


def test_what_another_imported_file_says_stays(
    release: Release, tmp_path: Path, install: Callable[..., int]
) -> None:
    main = main_file(tmp_path, DEBIAN)
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/gc.toml").write_text(f"version = 2\n{OTHER}", encoding="utf-8")

    assert install() == 0
    assert dumped(release, main)["plugins"]["io.containerd.gc.v1.scheduler"]["deletion_threshold"] == 7  # type: ignore[index]


@pytest.mark.parametrize(
    ("release", "number"),
    [
        pytest.param(release, number, id=f"{release.name}-{number}")
        for release in RELEASES
        for number in (2, 3)
        if reads(release, number=number)
    ],
    indirect=["release"],
)
def test_the_line_that_is_missing_makes_it_work(
    release: Release,
    tmp_path: Path,
    install: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    main = main_file(tmp_path, DEBIAN if number == 2 else THIRD, number=number, imports="")
    assert install() == 1
    line = capsys.readouterr().err.partition("put the line `")[2].partition("`")[0]
    assert not (tmp_path / "conf.d").exists()

    text = main.read_text(encoding="utf-8")
    main.write_text(f"{line}\n{text}", encoding="utf-8")
    assert install() == 0


def test_imports_of_another_place_are_extended(
    release: Release, tmp_path: Path, install: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    imports = f'imports = ["{tmp_path}/other.d/*.toml"]\n'
    main = main_file(tmp_path, DEBIAN, imports=imports)
    assert install() == 1
    line = capsys.readouterr().err.partition("replace its `imports` with `")[2].partition("`")[0]
    assert f"{tmp_path}/other.d/*.toml" in line

    main.write_text(main.read_text(encoding="utf-8").replace(imports, f"{line}\n"), encoding="utf-8")
    assert install() == 0


def test_without_a_main_file_its_lines_are_named(
    release: Release, tmp_path: Path, install: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert install() == 1
    words = capsys.readouterr().err.split("`")
    (tmp_path / "config.toml").write_text(f"{words[1]}\n{words[3]}\n", encoding="utf-8")

    assert install() == 0


def test_what_was_printed_is_what_is_written(
    release: Release, tmp_path: Path, install: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    main_file(tmp_path, KUBEADM)
    assert install("--print") == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "conf.d").exists()

    assert install() == 0
    assert (tmp_path / drop_in.NAME).read_text(encoding="utf-8") == printed


def test_a_read_only_place_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    release = RELEASES[-1]
    main_file(tmp_path, DEBIAN)
    script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    argv: list[str | Path] = ["unshare", "--mount", "sh", "-ec", script, "sh", tmp_path]
    argv += [SHIM_DIRECTORY / "hako", "install", "--no-image"]
    argv += ["--containerd", release.programs / "containerd"]
    done = subprocess.run(
        [*argv, "--containerd-config", tmp_path / "config.toml"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr == (
        f"install: {tmp_path}/conf.d/hako.toml: Read-only file system; "
        "make it writable, or put what `hako install --print` shows there\n"
    )
