"""Find the version of the calling containerd, which does not send it; asking its program is slow."""

from __future__ import annotations

import contextlib
import json
import os

from shim import zygote_protocol
from shim.host import private_directory, state_directory
from shim.refusal import Refusal

_TIMEOUT_S = 5.0
_REMEDY = 'set shim.protocol to "ttrpc" in the configuration'


def find(program: str) -> str:
    """Return the version of a containerd, such as ``1.7.24``.

    The answer is cached until the program's file changes.

    :param program: its path.
    :raises Refusal: if the program does not print it.
    """
    kept = os.path.join(zygote_protocol.ZYGOTE_DIRECTORY, "containerd")
    try:
        status = os.stat(program)
    except OSError as error:
        raise Refusal(f"start: {program}: {error.strerror}; {_REMEDY}") from error
    file = [program, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError), open(kept, encoding="utf-8") as opened:
        known = json.load(opened)
        if isinstance(known, list) and known[:-1] == file:
            return str(known[-1])
    version = _ask(program)
    with contextlib.suppress(OSError):
        private_directory.make(zygote_protocol.ZYGOTE_DIRECTORY)
        state_directory.write_atomically(kept, json.dumps([*file, version]))
    return version


def _ask(program: str) -> str:
    import subprocess  # noqa: PLC0415 - rarely needed

    try:
        output = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
            text=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal(f"start: {program} --version: {error}; {_REMEDY}") from error
    # "containerd <Go module> <version> <revision>"
    words = output.split()
    if len(words) < 3:
        raise Refusal(f"start: {program} --version: {output[:80]!r} is not a version; {_REMEDY}")
    return words[2].removeprefix("v")
