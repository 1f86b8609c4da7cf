"""Each sandbox's own user for its processes, and how strictly the operator requires it.

A shim takes a number by a lock on the number's byte of a file, so that no two shims have it. The byte is not
zero while processes may run with the number. If it is not zero but not locked, the shim was killed, and its
processes may still run.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import secrets
import struct
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, Self

from hypervisor import Accelerator, Identity
from shim.errors import FailedPrecondition
from shim.host import host_process, private_directory

if TYPE_CHECKING:
    from hypervisor import VmSpec
    from shim.config import Config

log = logging.getLogger(__name__)

DIRECTORY = "/run/hako/jail"
_NUMBERS = "numbers"
_UNUSED, _USED = b"\0", b"\1"
_FLOCK = struct.Struct("=hh4xqqi4x")  # struct flock of fcntl(2) on x86-64
_ATTEMPTS = 1000
_REMEDY = "see what `hako check` says of it, or set [hypervisor] jail to preferred or off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Jail:
    """The confinement of one sandbox's processes.

    :param identity: their user; no other process on this host has it until :meth:`close`.
    :param is_required: whether a machine that cannot be confined must not start.
    :param lock: an open file that holds the claim.
    """

    identity: Identity
    is_required: bool
    lock: FileIO

    @classmethod
    def of(cls, config: Config, accelerator: Accelerator) -> Self | None:
        """Take a number that no other sandbox has, and no process that another has left.

        :param config: the operator's configuration.
        :param accelerator: how guest instructions are run.
        :returns: ``None`` if the sandbox is not confined, or no number is free and none is required.
        :raises FailedPrecondition: if no number is free, but one is required.
        """
        if config.hypervisor.jail == "off":
            return None
        required = is_required(config, accelerator)
        first, count = config.hypervisor.jail_first_id, config.hypervisor.jail_ids
        try:
            lock, number = _claim(range(first, first + count))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            problem = f"boot: jail: no user of its own: {where}{error.strerror}"
            if required:
                raise FailedPrecondition(f"{problem}; {_REMEDY}") from error
            log.warning("%s; the sandbox's processes run as root", problem)
            return None
        identity = Identity(uid=number, gid=number)
        return cls(identity=identity, is_required=required, lock=FileIO(lock, "r+"))

    def close(self) -> None:
        """Release the number, once no process runs with it. May be called repeatedly."""
        if not self.lock.closed:
            os.pwrite(self.lock.fileno(), _UNUSED, self.identity.uid)
            self.lock.close()


def is_required(config: Config, accelerator: Accelerator) -> bool:
    """Tell whether a machine that cannot be confined must not start.

    :param config: the operator's configuration.
    :param accelerator: how guest instructions are run. Emulation is not a security boundary, so a jail beside
        it gains nothing.
    """
    wish = config.hypervisor.jail
    return wish == "required" or (wish == "auto" and accelerator is Accelerator.KVM)


def without(spec: VmSpec, problem: str, jail: Jail | None) -> VmSpec:
    """Describe a machine that could not be confined as an unconfined one.

    :param spec: the machine.
    :param problem: why it could not.
    :param jail: its intended confinement.
    :raises FailedPrecondition: if it must not start then.
    """
    if jail is not None and jail.is_required:
        raise FailedPrecondition(f"boot: jail: {problem}; {_REMEDY}")
    log.warning("boot: jail: %s; the sandbox's processes run as root", problem)
    return dataclasses.replace(spec, jail=None)


def refuse_unbounded(problem: str, jail: Jail | None) -> None:
    """Refuse a machine that could use up the host, if it must be confined.

    :param problem: why it has no limits; empty if it has.
    :param jail: what confines it.
    :raises FailedPrecondition: if it must not start then.
    """
    if problem and jail is not None and jail.is_required:
        raise FailedPrecondition(f"boot: jail: cgroup: {problem}; {_REMEDY}")


def _claim(numbers: range) -> tuple[int, int]:
    """Take a number that is free; return the open file that holds its lock, and the number."""
    private_directory.make(DIRECTORY)
    file = os.open(f"{DIRECTORY}/{_NUMBERS}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    left_behind = set()
    try:
        for _ in range(_ATTEMPTS):
            number = numbers[secrets.randbelow(len(numbers))]
            if number in left_behind or not _lock(file, number, fcntl.F_WRLCK):
                continue
            if os.pread(file, 1, number) != _USED or not host_process.user_has_any(number):
                os.pwrite(file, _USED, number)
                return file, number
            left_behind.add(number)
            _lock(file, number, fcntl.F_UNLCK)
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    raise OSError(errno.EAGAIN, f"none of {len(numbers)} numbers is free; raise [hypervisor] jail_ids")


def _lock(file: int, number: int, kind: int) -> bool:
    """Lock or unlock a number's byte, which need not be there yet; tell whether that was possible at once."""
    try:
        # The lock belongs to the open file, not to the process, and ends with this descriptor.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))
    except OSError as error:
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise
        return False
    return True
