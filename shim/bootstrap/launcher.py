"""``python -m shim.bootstrap.launcher``: write a ``containerd-shim-hako-v2`` that starts faster than pip's.

With pip's launcher, the interpreter looks at every installed package before the first line runs, which takes
as long as everything else. This one names everything that it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shim.refusal import Refusal

NAME = "containerd-shim-hako-v2"
_MAX_FIRST_LINE = 127  # of any kernel: execve(2)
_TIMEOUT_S = 10.0

# -I: no path or variable of the caller; -S: no search for packages.
_TEXT = """\
#!{interpreter} -IS
import sys
sys.path[:0] = {own!r}
sys.path += {libraries!r}
sys.executable = {executable!r}
{renaming}sys.orig_argv = [sys.executable, *sys.argv]
from shim.entry import main
sys.exit(main())
"""


def text(interpreter: str) -> str:
    """Return the program, for the packages that this process runs with.

    :param interpreter: the interpreter that runs it.
    :raises Refusal: if that path is too long for the first line of a script.
    """
    if len(f"#!{interpreter} -IS") > _MAX_FIRST_LINE:
        raise Refusal(f"launcher: {interpreter}: its path is too long for a script; use pip's program")
    own = str(Path(__file__).resolve().parents[2])
    libraries = [path for path in sys.path if path.endswith("-packages") and path != own]
    return render(interpreter=interpreter, own=own, libraries=libraries, executable=sys.executable)


def render(
    *, interpreter: str, own: str, libraries: list[str], executable: str, name: str | None = None
) -> str:
    """Return the program, for given paths.

    :param interpreter: what runs it.
    :param own: where Hako's packages are.
    :param libraries: where the others are.
    :param executable: the interpreter that finds all of these by itself.
    :param name: what the program calls itself, if not by the path that it is run by.
    """
    return _TEXT.format(
        interpreter=interpreter,
        own=[own],
        libraries=libraries,
        executable=executable,
        renaming="" if name is None else f"sys.argv[0] = {name!r}\n",
    )


def fastest_interpreter() -> str:
    """Find the fastest-starting interpreter among those that can run the same code as this one.

    The distribution's interpreter has sockets built in; others load a library for them. The virtual
    environment's interpreter runs the shims in any case.
    """
    # A virtual environment's interpreter would first look for its configuration.
    own = os.path.realpath(sys.executable)
    if "_socket" in sys.builtin_module_names:
        return own
    candidate = "/usr/bin/python{}.{}".format(*sys.version_info)
    question = "import sys; print('_socket' in sys.builtin_module_names)"
    try:
        answer = subprocess.run(
            [candidate, "-ISc", question], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return own
    return candidate if answer.stdout == "True\n" else own


def write(path: Path) -> None:
    """Replace another program by this one, in one step.

    :param path: the other program.
    :raises Refusal: as :func:`text` does.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text(fastest_interpreter()), encoding="utf-8")
    new.chmod(0o755)
    new.replace(path)


if __name__ == "__main__":
    try:
        write(Path(sys.executable).with_name(NAME))
    except Refusal as refusal:
        sys.exit(str(refusal))
