"""The distribution's packages: resolved and fetched with apt, unpacked with dpkg-deb, never installed."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

from guest.image.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

# Resolving against an empty package status yields the whole closure, regardless of this machine's packages.
_APT = (
    "apt-get",
    "-o",
    "Dir::State::status=/dev/null",
    "-o",
    "Dir::Cache::pkgcache=",
    "-o",
    "Dir::Cache::srcpkgcache=",
    "-o",
    "Debug::NoLocking=1",
    "-o",
    "APT::Sandbox::User=root",
    "-o",
    "APT::Install-Recommends=0",
)
_RESOLVE_TIMEOUT_S = 120
_FETCH_TIMEOUT_S = 900
_UNPACK_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """One package file the distribution offers.

    :param name: the package's name.
    :param version: its full version, epoch included.
    :param file: the name apt gives the downloaded file.
    """

    name: str
    version: str
    file: str


def kernel_package() -> str:
    """Name the distribution's small virtual-machine kernel package.

    :returns: a package name.
    :raises ImageError: if the distribution is neither Debian nor Ubuntu.
    """
    release = platform.freedesktop_os_release()
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    if release.get("ID") == "ubuntu" or "ubuntu" in family:
        return "linux-image-virtual"
    if "debian" in family:
        return "linux-image-cloud-amd64"
    raise ImageError(
        f"image: kernel: no kernel package is known for {release.get('ID', 'this distribution')}; "
        "give --kernel and --modules"
    )


def resolve(names: tuple[str, ...]) -> tuple[Package, ...]:
    """Resolve packages and everything they depend on.

    :param names: the packages wanted.
    :returns: the closure, sorted by name.
    :raises ImageError: if apt cannot resolve them.
    """
    output = _run(
        [*_APT, "-qq", "-y", "--print-uris", "install", *names],
        what=" ".join(names),
        remedy="run apt-get update",
        timeout_s=_RESOLVE_TIMEOUT_S,
    )
    found = []
    for line in output.splitlines():
        if not line.startswith("'"):
            continue
        file = line.split()[1]
        name, version, _architecture = file.removesuffix(".deb").split("_")
        found.append(Package(name=name, version=unquote(version), file=file))
    if not found:
        raise ImageError(f"image: packages: apt named no file for {' '.join(names)}; run apt-get update")
    return tuple(sorted(found))


def fetch(packages: tuple[Package, ...], *, cache: Path) -> None:
    """Download what the cache lacks; apt checks each file against the signed index.

    :param packages: the packages wanted.
    :param cache: directory of the downloaded files.
    :raises ImageError: if apt fails.
    """
    missing = [package for package in packages if not (cache / package.file).exists()]
    if not missing:
        return
    cache.mkdir(parents=True, exist_ok=True)
    _run(
        [*_APT, "-qq", "download", *(f"{package.name}={package.version}" for package in missing)],
        what=f"{len(missing)} package files",
        remedy="check the network and run apt-get update",
        timeout_s=_FETCH_TIMEOUT_S,
        cwd=cache,
    )


def unpack(packages: tuple[Package, ...], *, cache: Path, staging: Path) -> None:
    """Unpack packages over one another into a directory, running none of their scripts.

    :param packages: fetched packages.
    :param cache: directory of the downloaded files.
    :param staging: where to unpack; must not exist yet.
    :raises ImageError: if a package cannot be unpacked.
    """
    # Older packages still ship /lib and /bin: with these links they land where the merged layout has them.
    for link in ("bin", "sbin", "lib", "lib64"):
        (staging / "usr" / link).mkdir(parents=True, exist_ok=True)
        (staging / link).symlink_to(f"usr/{link}")
    for package in packages:
        archive = cache / package.file
        with subprocess.Popen(
            ("/usr/bin/dpkg-deb", "--fsys-tarfile", str(archive)), stdout=subprocess.PIPE
        ) as producer:
            _run(
                ["tar", "--extract", "--keep-directory-symlink", "--directory", str(staging)],
                what=package.file,
                remedy=f"remove {archive} and try again",
                timeout_s=_UNPACK_TIMEOUT_S,
                stdin=producer.stdout,
            )
        if producer.returncode != 0:
            raise ImageError(
                f"image: packages: {package.file}: dpkg-deb failed; remove {archive} and try again"
            )


def _run(
    argv: list[str],
    *,
    what: str,
    remedy: str,
    timeout_s: float,
    cwd: Path | None = None,
    stdin: IO[bytes] | None = None,
) -> str:
    try:
        done = subprocess.run(
            argv, stdin=stdin, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, check=False
        )
    except FileNotFoundError as error:
        raise ImageError(
            f"image: packages: {argv[0]} is missing; this needs a Debian or Ubuntu host"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"image: packages: {what}: no end after {timeout_s:.0f} s; {remedy}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [done.stderr.strip()]
        raise ImageError(f"image: packages: {what}: {lines[0]}; {remedy}")
    return done.stdout
