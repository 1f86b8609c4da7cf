"""The version of a program on the host, as the program prints it."""

from __future__ import annotations

import shutil
import subprocess

_TIMEOUT_S = 10.0


def version_line(program: str) -> str:
    """Run ``PROGRAM --version``.

    :param program: its name or path.
    :returns: the first line that it prints.
    :raises FileNotFoundError: if it does not exist.
    :raises OSError: if it cannot be run, fails or does not answer in time. The text names the program's path.
    """
    path = shutil.which(program)
    if path is None:
        raise FileNotFoundError(f"{program}: not found")
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{path} --version: no answer within {_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise OSError(f"{path} --version: exit status {done.returncode}")
    return done.stdout.partition("\n")[0]
