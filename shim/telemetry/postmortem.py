"""The record of a sandbox after a bad end: the reason and the guest's last console lines.

The state directory disappears with the sandbox, but an operator asks later. There is one small file for each
sandbox id; the newest hundred are kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shim.host import private_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KEPT_FILES = 100
CONSOLE_LINES = 50


def path_of(log_dir: Path, *, namespace: str, sandbox_id: str, suffix: str = ".log") -> Path:
    """Name the file of one sandbox; containerd's rules allow no two underscores in a row in either name."""
    return log_dir / f"{namespace}__{sandbox_id}{suffix}"


def write(log_dir: Path, *, namespace: str, sandbox_id: str, reason: str, console: Sequence[str]) -> None:
    """Keep the reason for an end; it replaces an earlier record of the same id.

    :param reason: one line.
    :param console: the guest's last console lines, oldest first.
    :raises OSError: if the directory cannot be written to.
    """
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [f"{when} {reason}", *(f"console: {line}" for line in console)]
    keep(path_of(log_dir, namespace=namespace, sandbox_id=sandbox_id), "".join(f"{line}\n" for line in lines))


def keep(path: Path, text: str) -> None:
    """Write a file of one sandbox, whole or not at all, and remove the oldest of its kind.

    :param path: what :func:`path_of` named.
    :raises OSError: if the directory cannot be written to.
    """
    log_dir, suffix = path.parent, path.suffix
    private_directory.make(str(log_dir))
    temporary = path.with_suffix(f"{suffix}.new")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.rename(path)
    for old in sorted(log_dir.glob(f"*{suffix}"), key=_modified)[:-KEPT_FILES]:
        old.unlink(missing_ok=True)


def read(log_dir: Path, *, sandbox_id: str, namespace: str = "*") -> str:
    """Return the records of a sandbox, by default in every namespace with the id.

    :returns: the text; empty if there is no record.
    """
    found = kept(log_dir, namespace=namespace, sandbox_id=sandbox_id)
    return "".join(path.read_text(errors="replace") for path in found)


def kept(log_dir: Path, *, namespace: str, sandbox_id: str, suffix: str = ".log") -> list[Path]:
    """Find the files of an id, the oldest first.

    :param namespace: containerd's; ``*`` for any.
    """
    import glob  # noqa: PLC0415 - no shim needs it

    wanted = "*" if namespace == "*" else glob.escape(namespace)
    name = path_of(log_dir, namespace=wanted, sandbox_id=glob.escape(sandbox_id), suffix=suffix).name
    if "/" in sandbox_id + namespace:  # no id has one
        return []
    return sorted(log_dir.glob(name), key=_modified)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # just pruned by another shim
        return 0.0
