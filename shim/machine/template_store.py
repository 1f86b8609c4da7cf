"""The store of templates: each is a directory named by its key, which appears whole or not at all.

Reading takes no lock; only one process builds at a time. A running clone no longer needs its template, so a
template may be removed at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.host import file_lock
from shim.host.ledger import Ledger
from shim.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

KEPT = 4
"""How many templates there can be; each is as large as the memory that its guest uses after boot."""
RETRY_S = 600.0
"""How long the first failure prevents background builds for its key."""
_LONGER_EACH_TIME = 6
_DAY_S = 86_400.0
_UNDO_S = 10.0
LATE_TIMES = 3
"""How many clones in a row may be late before their template is blamed: the host may be busy."""

_KEY = re.compile(r"[0-9a-f]{16,128}")
_LOCK = "lock"
_LOG = "log"
_BUILDING = ".building"
_REMOVED = ".removed-"
_PURPOSE = "purpose.json"
_FAILED = ".failed"
_DISCARDED = ".discarded"
_LATE = ".late"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A template as it was found.

    :param key: the machines that it fits.
    :param path: its directory.
    :param identity: tells it from a later one in its place, which may even have the same inode number.
    """

    key: str
    path: Path
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateEntry:
    """A template, or a failure to build one, as an entry of a list.

    :param key: the machines that it fits.
    :param purpose: the requested settings of its machine, by name.
    :param size_bytes: its size on the disk or in memory, holes not counted.
    :param built_at: when it was built, in seconds since 1970.
    :param used_at: when a machine was last cloned from it, in seconds since 1970.
    :param failure: why it could not be built; empty for a template.
    """

    key: str
    purpose: Mapping[str, object]
    size_bytes: int
    built_at: float
    used_at: float
    failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Building:
    """A build in progress.

    :param place: an empty directory, which is removed when the build is over.
    :param lock: an open file whose lock prevents other builds.
    """

    place: Path
    lock: int


class TemplateStore:
    """The templates in one directory.

    A template becomes the memory of machines, so no other user may write there.

    :param directory: their directory; made when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, key: str) -> Template | None:
        """Find the template with a key, and record its use.

        :raises Refusal: if another user can write to the store.
        """
        path = self.directory / key
        try:
            identity = _identity(path)
            self._check()
            os.utime(path)
        except FileNotFoundError:
            return None
        return Template(key=key, path=path, identity=identity)

    def failure(self, key: str) -> str:
        """Return why a build failed recently; empty if none did."""
        path = self.directory / f"{key}{_FAILED}"
        try:
            return path.read_text(encoding="utf-8") if _age_s(path) < self._retry_s(key) else ""
        except FileNotFoundError:
            return ""

    def is_building(self) -> bool:
        """Tell whether a process is building now."""
        try:
            lock = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not file_lock.take(lock, fcntl.LOCK_SH, timeout_s=0)
        finally:
            os.close(lock)

    def open_log(self) -> int:
        """Open the log of a background builder; the previous log is lost.

        :returns: a descriptor.
        :raises Refusal: if another user can write to the store.
        :raises OSError: if it cannot be made.
        """
        self._make()
        return os.open(self.directory / _LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def discard(self, template: Template, *, reason: str) -> None:
        """Remove a useless template, but not its replacement.

        The second time within a day counts as a failure to build one, and each further time for longer,
        unless a clone has answered meanwhile. Otherwise templates would be built and discarded endlessly.

        :param reason: why it is useless, in one line.
        :raises OSError: if it cannot be removed.
        """
        try:
            if _identity(template.path) != template.identity:
                return
        except FileNotFoundError:
            return
        self._remove(template.path)
        self._forget(template.key, _LATE)
        if self._count(template.key, _DISCARDED) > 1:
            self.fail(template.key, reason)

    def is_late(self, template: Template) -> bool:
        """Record that a clone was late.

        :returns: whether the template is to blame, because too many clones in a row were late.
        :raises OSError: if it cannot be recorded.
        """
        return self._count(template.key, _LATE) >= LATE_TIMES

    def answers(self, template: Template) -> None:
        """Record that a clone has answered, so its template is good."""
        for mark in (_LATE, _DISCARDED):
            self._forget(template.key, mark)

    def entries(self) -> list[TemplateEntry]:
        """List the templates and the failures, the last used first."""
        found = [self._entry(path) for path in self._paths()]
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used_at, reverse=True)

    def remove(self, key: str) -> list[str]:
        """Remove the template, or the failure, whose key has this prefix.

        :param key: the beginning of one key; all keys if it is empty.
        :returns: the keys.
        :raises Refusal: if there is none, or more than one.
        :raises OSError: if one cannot be removed.
        """
        paths = {path for path in self._paths() if path.name.startswith(key)}
        keys = sorted({path.name.removesuffix(_FAILED) for path in paths})
        if key and not keys:
            raise Refusal(f"template: {key}: there is none; see `hako template ls`")
        if key and len(keys) > 1:
            raise Refusal(f"template: {key}: {len(keys)} keys begin with it; give more of the key")
        for path in paths:
            self._remove(path)
        return keys

    @contextlib.contextmanager
    def building(self, *, wait_s: float) -> Iterator[Building]:
        """Take the lock for building, and make a directory that is removed at the end of the block.

        Leftovers of killed builders are removed first, also elsewhere on the host.

        :param wait_s: how long to wait for other builders, in seconds.
        :returns: where to build.
        :raises Refusal: if another process builds for that long, another user can write to the store, or the
            leftovers cannot be removed.
        :raises OSError: if the directory cannot be made.
        """
        self._make()
        path = self.directory / _LOCK
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o600)
        try:
            if not file_lock.take(lock, timeout_s=wait_s):
                raise Refusal(
                    f"template: {path}: another build has held it for {wait_s:g} s; "
                    "find it with `fuser` and end it"
                    if wait_s
                    else "template: another is being built; try again later"
                )
            self._clear()
            place = self.directory / _BUILDING
            place.mkdir(mode=0o700)
            try:
                yield Building(place=place, lock=lock)
            finally:
                remove_remains(place)  # the guard may be removing it, too
        finally:
            os.close(lock)

    def fail(self, key: str, reason: str) -> None:
        """Record that a template cannot be built, so that no process tries for a while.

        :param reason: one line.
        :raises OSError: if it cannot be written.
        """
        (self.directory / f"{key}{_FAILED}").write_text(reason, encoding="utf-8")

    def publish(self, key: str, built: Path, *, purpose: Mapping[str, object]) -> Template:
        """Make a built template available; remove those that it replaces, and those that are too many.

        :param key: the machines that it fits.
        :param built: the directory with its files, below the place of the current build.
        :param purpose: the requested settings of its machine, by name.
        :raises OSError: if it cannot be done.
        """
        (built / _PURPOSE).write_text(json.dumps(dict(purpose)), encoding="utf-8")
        path = self.directory / key
        self._remove(path)
        built.rename(path)
        (self.directory / f"{key}{_FAILED}").unlink(missing_ok=True)
        others = [entry for entry in self.entries() if entry.key != key and not entry.failure]
        for place, entry in enumerate(others, start=1):
            # A template for the same purpose with another key belongs to a kernel, an image or a QEMU that
            # has been replaced, so it is no longer needed.
            if entry.purpose == purpose or place >= KEPT:
                self._remove(self.directory / entry.key)
        return Template(key=key, path=path, identity=_identity(path))

    def _retry_s(self, key: str) -> float:
        times = self._counted(key, _DISCARDED)
        return min(RETRY_S * float(_LONGER_EACH_TIME ** max(times - 2, 0)), _DAY_S)

    def _counted(self, key: str, mark: str) -> int:
        """Read how often an event was recorded for a key within the last day."""
        path = self.directory / f"{key}{mark}"
        with contextlib.suppress(FileNotFoundError, ValueError):
            if _age_s(path) < _DAY_S:
                return int(path.read_text(encoding="ascii"))
        return 0

    def _count(self, key: str, mark: str) -> int:
        times = self._counted(key, mark) + 1
        (self.directory / f"{key}{mark}").write_text(str(times), encoding="ascii")
        return times

    def _forget(self, key: str, mark: str) -> None:
        (self.directory / f"{key}{mark}").unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        try:
            everything = list(self.directory.iterdir())
        except FileNotFoundError:
            return []
        return [path for path in everything if _KEY.fullmatch(path.name.removesuffix(_FAILED))]

    def _entry(self, path: Path) -> TemplateEntry | None:
        try:
            changed_at = path.stat().st_mtime
            if path.suffix == _FAILED:
                return TemplateEntry(
                    key=path.stem,
                    purpose={},
                    size_bytes=0,
                    built_at=changed_at,
                    used_at=changed_at,
                    failure=path.read_text(encoding="utf-8"),
                )
            purpose = path / _PURPOSE
            return TemplateEntry(
                key=path.name,
                purpose=json.loads(purpose.read_text(encoding="utf-8")),
                size_bytes=sum(file.stat().st_blocks for file in path.iterdir()) * 512,  # stat(2)
                built_at=purpose.stat().st_mtime,
                used_at=changed_at,
                failure="",
            )
        except FileNotFoundError:  # just removed, or not written by this program
            return None
        except ValueError:
            return None

    def _make(self) -> None:
        for place in (
            self.directory.parent,
            self.directory,
        ):  # the state of sandboxes may be in the same directory
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check()

    def _check(self) -> None:
        found = self.directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise Refusal(
                f"template: {self.directory}: must be a directory of uid {os.geteuid()} that no other can "
                "write to; correct that, or set [hypervisor] template_dir"
            )

    def _clear(self) -> None:
        """Remove the remains of unfinished builds and removals; the lock is held."""
        for path in self.directory.iterdir():
            if path.name == _BUILDING or path.name.startswith(_REMOVED):
                for failure in remove_remains(path):
                    raise Refusal(f"template: {failure}")
            elif path.suffix in {_FAILED, _DISCARDED, _LATE} and _age_s(path) > _DAY_S:
                path.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        """Remove a template, or a failure, in one step."""
        if path.suffix == _FAILED:
            path.unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            grave = self.directory / f"{_REMOVED}{os.getpid()}-{time.monotonic_ns()}"
            path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)


def remove_remains(place: Path) -> list[str]:
    """Undo a build: the entries of its ledger, if there is one, and its directory.

    :param place: the directory.
    :returns: what could not be undone and why, one line each; the ledger stays in that case.
    """
    with contextlib.suppress(FileNotFoundError):
        ledger = Ledger(str(place))
        try:
            return ledger.undo_all(deadline_s=_UNDO_S)
        finally:
            ledger.close()
    shutil.rmtree(place, ignore_errors=True)
    return []


def _identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, (path / _PURPOSE).stat().st_mtime_ns


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime
