#!/usr/bin/env python3
"""Unpack one package of another Debian suite into a directory, without installing it.

apt runs with a private state, cache and source list, so the system's own lists of packages do not change.
apt still verifies everything, with the keyring from Debian's ``debian-archive-keyring``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path("/var/cache/hako")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def debian_mirror() -> str:
    """Return the URI from which the system takes Debian's main archive.

    :raises RuntimeError: if no configured source serves the running release.
    """
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
        if "=" in line
    )
    codename = release.get("VERSION_CODENAME", "").strip('"')
    targets = subprocess.run(
        [
            "/usr/bin/apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for target in targets.splitlines():
        uri, suite, component = target.split()
        if (suite, component) == (codename, "main"):
            return uri
    raise RuntimeError(f"fetch package: apt: no source for Debian {codename} main; add one to /etc/apt")


def apt_options(suite: str) -> list[str]:
    """Write the private apt configuration of a suite and return the options that select it.

    :param suite: a Debian suite such as ``trixie`` or ``sid``.
    """
    home = CACHE / "apt" / suite
    for directory in ("etc/preferences.d", "lists/partial", "archives/partial"):
        (home / directory).mkdir(parents=True, exist_ok=True)
    (home / "status").touch()
    sources = home / "etc" / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {debian_mirror()} {suite} main\n", encoding="utf-8")
    settings = {
        "Dir::Etc": f"{home}/etc",
        "Dir::Etc::SourceList": str(sources),
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": str(home),
        "Dir::State::Lists": f"{home}/lists",
        "Dir::State::status": f"{home}/status",
        "Dir::Cache": str(home),
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "APT::Sandbox::User": "root",
    }
    return [option for key, value in settings.items() for option in ("-o", f"{key}={value}")]


def fetch(package: str, *, suite: str, directory: Path, with_dependencies: bool) -> None:
    """Unpack the files of a package into ``directory``, unless it exists already.

    :param package: the name of a Debian package.
    :param suite: the suite that it is taken from.
    :param directory: it appears whole or not at all.
    :param with_dependencies: whether to unpack the package's dependencies there, too.
    :raises RuntimeError: if no mirror is configured.
    :raises subprocess.CalledProcessError: if apt or dpkg fails; their own message is on standard error.
    """
    if directory.is_dir():
        return
    options = apt_options(suite)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(
        ["/usr/bin/apt-get", *options, "-qq", "update"], check=True, env=environment, stdout=sys.stderr
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as temporary:
        download = Path(temporary)
        command = ["download", package]
        if with_dependencies:
            (download / "archives" / "partial").mkdir(parents=True)
            options += ["-o", f"Dir::Cache={download}", "-o", "APT::Install-Recommends=false"]
            command = ["install", "--yes", "--download-only", package]
        subprocess.run(
            ["/usr/bin/apt-get", *options, "-qq", *command],
            check=True,
            env=environment,
            cwd=download,
            stdout=sys.stderr,
        )
        unpacked = download / "unpacked"
        for archive in sorted(download.rglob("*.deb")):
            subprocess.run(["/usr/bin/dpkg-deb", "-x", str(archive), str(unpacked)], check=True)
        shutil.move(unpacked, directory)


def main() -> int:
    """Run ``fetch_package.py SUITE PACKAGE DIRECTORY [--with-dependencies]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("package")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--with-dependencies", action="store_true")
    arguments = parser.parse_args()
    try:
        fetch(
            arguments.package,
            suite=arguments.suite,
            directory=arguments.directory,
            with_dependencies=arguments.with_dependencies,
        )
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
