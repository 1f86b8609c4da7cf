"""Build the Debian package: ``scripts/package``.

Times and owners are fixed. Wheels come from PyPI, in the versions of ``scripts/constraints.txt``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import module_tree
from scripts.debian import commands, completion, control, manual
from scripts.document import ROOT
from shim import cli, config
from shim.bootstrap import launcher
from shim.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable

_SOURCES = ("shim", "hypervisor", "guest", "proto", "pyproject.toml", "README.md", "scripts/build_proto.py")
_PLATFORMS = (
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_34_x86_64",
)
#: The libraries for traces: five megabytes, a small part beside those of gRPC and cryptography.
_EXTRA = "tracing"
_INTERPRETER = "/usr/bin/python3"
_EPOCH = 1_767_225_600  # 2026-01-01: of all files, unless SOURCE_DATE_EPOCH says otherwise
#: What pip notes of an installation, and no program reads.
_NOTES = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL"}
_GUEST = "usr/share/hako/guest"

# It finds its place by itself, so it also runs from an unpacked package. The release's own interpreter runs
# it, so its command line shows which release it needs.
_HAKO = """\
#!/bin/sh
program=$(readlink -f "$0")
exec "${program%/*}/python" -I -m shim.cli "$@"
"""

_COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: {name}

Files: *
Copyright: {authors}
License: {license}
 The licenses of the libraries in /usr/lib/hako are in the .dist-info directories
 beside them. On Debian systems, the Apache License 2.0 is in
 /usr/share/common-licenses/Apache-2.0.
"""


def build(output: Path, *, version: str = VERSION, guest: Path | None = None) -> Path:
    """Build the package.

    :param output: the directory that it goes to.
    :param version: another version than the tree's.
    :param guest: the directory of a guest image that it brings along.
    :returns: its path.
    :raises subprocess.CalledProcessError: if pip or dpkg-deb fails; its message is on standard error.
    :raises FileNotFoundError: if the guest image is not whole.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hako-package-") as scratch:
        tree = Path(scratch) / "tree"
        pristine = tree / control.PRISTINE
        packages = pristine / "packages"
        install_packages(_wheel(Path(scratch), version), packages, scratch=Path(scratch))
        release = f"{version}-{_digest(packages)[:8]}"
        _write_programs(pristine, release)
        _write_system_files(tree, version=version, project=project)
        if guest is not None:
            _copy_guest(guest, tree / _GUEST)
        _set_times(tree)
        _write_description(tree, version=version, release=release, project=project)
        product = output / f"hako_{version}_amd64.deb"
        subprocess.run(
            ["/usr/bin/dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, product],
            check=True,
            stdout=sys.stderr,
            env={**os.environ, "SOURCE_DATE_EPOCH": str(_epoch())},
        )
    return product


def _wheel(scratch: Path, version: str) -> Path:
    """Build Hako's own wheel from a copy of the tree."""
    copy = scratch / "source"
    listed = subprocess.run(
        [
            "/usr/bin/git",
            "-C",
            ROOT,
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
            *_SOURCES,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    told = copy / "shim/version.py"
    told.write_text(
        told.read_text(encoding="utf-8").replace(f'VERSION = "{VERSION}"', f'VERSION = "{version}"'),
        encoding="utf-8",
    )
    wheels = scratch / "wheel"
    _pip("wheel", "--no-deps", "--wheel-dir", wheels, copy)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def install_packages(wheel: Path, directory: Path, *, scratch: Path) -> None:
    """Fill a directory with a wheel and all that it and its extra need, for every Python.

    :param wheel: the wheel.
    :param directory: made by this.
    :param scratch: a directory for the moment.
    :raises subprocess.CalledProcessError: if pip fails.
    :raises RuntimeError: if two Pythons need different files of one name.
    """
    directory.mkdir(parents=True)
    platforms = [f"--platform={each}" for each in _PLATFORMS]
    for python in control.PYTHONS:
        target = scratch / python
        arguments: list[str | Path] = ["install", "--target", target, "--no-compile", "--only-binary=:all:"]
        arguments += ["--implementation=cp", f"--python-version={python}", *platforms]
        _pip(*arguments, "--constraint", ROOT / "scripts/constraints.txt", f"{wheel}[{_EXTRA}]")
        for path in sorted(target.rglob("*")):
            if path.is_file() and _is_wanted(path.relative_to(target)):
                _merge(path, directory / path.relative_to(target))


def _is_wanted(path: Path) -> bool:
    if path.parts[0] == "bin" or "__pycache__" in path.parts:
        return False
    return not (path.parts[0].endswith(".dist-info") and path.name in _NOTES)


def _merge(source: Path, target: Path) -> None:
    if target.exists():
        if source.read_bytes() != target.read_bytes():
            raise RuntimeError(f"package: {target.name}: it differs between Pythons; keep it apart for each")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def _pip(*arguments: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, *arguments],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(_epoch()), "PIP_ROOT_USER_ACTION": "ignore"},
    )


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(directory):
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(directory: Path) -> Iterable[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink())


def _write_programs(pristine: Path, release: str) -> None:
    """Write what makes a virtual environment for the Python that is there, and the programs in it."""
    final = f"/{control.ROOT}/{release}"
    programs = pristine / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(_INTERPRETER)
    _write(pristine / "pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\n")
    for python in control.PYTHONS:
        site = pristine / "lib" / f"python{python}" / "site-packages"
        site.parent.mkdir(parents=True)
        site.symlink_to("../../packages")
    shim = launcher.render(
        interpreter=_INTERPRETER,
        own=f"{final}/packages",
        libraries=[],
        executable=f"{final}/bin/python",
        name=f"{final}/bin/{launcher.NAME}",
    )
    _write(programs / launcher.NAME, shim, mode=0o755)
    _write(programs / "hako", _HAKO, mode=0o755)


def _write_system_files(tree: Path, *, version: str, project: dict[str, object]) -> None:
    (tree / "usr/bin").mkdir()
    for name in ("hako", launcher.NAME):
        (tree / "usr/bin" / name).symlink_to(f"../lib/hako/current/bin/{name}")
    share = tree / "usr/share"
    described = commands.described(cli.parser())
    _write_compressed(share / "man/man1/hako.1.gz", manual.hako(described, version=version))
    _write_compressed(share / f"man/man8/{launcher.NAME}.8.gz", manual.shim(version=version))
    _write(share / "bash-completion/completions/hako", completion.bash(described))
    _write(share / "zsh/vendor-completions/_hako", completion.zsh(described))
    _write(share / "fish/vendor_completions.d/hako.fish", completion.fish(described))
    documents = share / "doc/hako"
    authors = ", ".join(str(each["name"]) for each in project["authors"])  # type: ignore[attr-defined]
    _write(
        documents / "copyright",
        _COPYRIGHT.format(name=project["name"], authors=authors, license=project["license"]),
    )
    _write_compressed(documents / "changelog.gz", (ROOT / "docs/changelog.md").read_text(encoding="utf-8"))
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name != "changelog.md":
            _write(documents / page.name, page.read_text(encoding="utf-8"))
    dashboard = (ROOT / "docs/grafana-dashboard.json").read_text(encoding="utf-8")
    _write(documents / "grafana-dashboard.json", dashboard)
    _write(documents / "examples/config.toml", example_configuration())
    for unit in sorted((ROOT / "scripts/debian").glob("*.service")):
        _write(tree / "usr/lib/systemd/system" / unit.name, unit.read_text(encoding="utf-8"))


def example_configuration() -> str:
    """Write a configuration that names every key and changes nothing."""
    lines = ["# Every key with its default. Copy what you change to /etc/hako/config.toml.\n"]
    for name, section in config.SECTIONS.items():
        lines.append(f"\n[{name}]\n")
        for key, declared in section.KEYS.items():
            text = declared.help.replace("``", "`")
            lines.append(
                f"# {text} Takes {declared.values()}{f' {declared.unit}' if declared.unit else ''}.\n"
            )
            lines.append(f"#{key} = {config.toml(declared.default)}\n")
    return "".join(lines)


def _copy_guest(guest: Path, target: Path) -> None:
    """Bring an image along."""
    if not (guest / "image.json").exists():
        raise FileNotFoundError(f"package: {guest}: no guest image; make one with `hako image build`")
    shutil.copytree(guest, target, ignore=shutil.ignore_patterns(".*"))


def _write_description(tree: Path, *, version: str, release: str, project: dict[str, object]) -> None:
    directory = tree / "DEBIAN"
    directory.mkdir()
    size = sum(path.stat().st_size for path in _files(tree))
    text = control.control(
        version=version,
        summary=str(project["description"]).removeprefix("A "),
        maintainer="The Hako authors <hako@localhost>",
        installed_kib=-(-size // 1024),
    )
    _write(directory / "control", text)
    for name, script in control.scripts(version=version, release=release).items():
        _write(directory / name, script, mode=0o755)
    sums = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(tree)}\n"
        for path in _files(tree)
        if directory not in path.parents
    ]
    _set_times(directory)
    _write(directory / "md5sums", "".join(sums))
    os.utime(directory / "md5sums", (_epoch(), _epoch()))
    os.utime(directory, (_epoch(), _epoch()))


def _write(path: Path, text: str, *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def _write_compressed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _epoch() -> int:
    return int(os.environ.get("SOURCE_DATE_EPOCH", _EPOCH))


def _set_times(tree: Path) -> None:
    """Give all of it one time and the usual modes."""
    for path in (*tree.rglob("*"), tree):
        if not path.is_symlink():
            is_program = path.parent.name in {"bin", "DEBIAN"} or path.name == module_tree.PROGRAM
            path.chmod(0o755 if path.is_dir() or is_program else 0o644)
        os.utime(path, (_epoch(), _epoch()), follow_symlinks=False)


def main() -> int:
    """Run ``scripts/package``."""
    parser = argparse.ArgumentParser(prog="scripts/package", description="Build the Debian package.")
    parser.add_argument("--output", type=Path, default=Path("dist"), metavar="DIR", help="(dist)")
    parser.add_argument("--version", default=VERSION, help=f"another version ({VERSION})")
    parser.add_argument(
        "--with-guest", type=Path, metavar="DIR", help="bring along the guest image of this directory"
    )
    chosen = parser.parse_args()
    try:
        print(build(chosen.output, version=chosen.version, guest=chosen.with_guest).resolve())
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"package: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
