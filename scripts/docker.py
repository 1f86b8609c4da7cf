"""Docker's programs from Debian's packages, for nightly tests: ``python -m scripts.docker`` fetches them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts import fetch_package

if TYPE_CHECKING:
    from pathlib import Path

RELEASES = {"26": "trixie", "28": "sid"}
"""The suite of Debian that has each release."""
_SUITE_OF_INIT = "trixie"


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The programs of one release.

    :param daemons: the directory of ``dockerd`` and ``docker-proxy``.
    :param client: the program ``docker``.
    :param init: what ``docker run --init`` puts into a container.
    """

    daemons: Path
    client: Path
    init: Path


def programs(release: str) -> Programs:
    """Return the programs of a release; fetch those that are not there.

    :param release: one of :data:`RELEASES`.
    :raises RuntimeError: as ``fetch_package.fetch``.
    :raises subprocess.CalledProcessError: likewise.
    """
    suite = RELEASES[release]
    return Programs(
        daemons=_fetched("docker.io", suite) / "usr/sbin",
        client=_fetched("docker-cli", suite) / "usr/bin/docker",
        init=_fetched("tini", _SUITE_OF_INIT) / "usr/bin/tini-static",
    )


def _fetched(package: str, suite: str) -> Path:
    directory = fetch_package.CACHE / f"{package}-{suite}"
    fetch_package.fetch(package, suite=suite, directory=directory, with_dependencies=False)
    return directory


def main() -> int:
    """Fetch all releases."""
    for release in RELEASES:
        programs(release)
    return 0


if __name__ == "__main__":
    sys.exit(main())
