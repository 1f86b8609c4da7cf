"""The Python part of the image: which standard library modules the agent imports, and their bytecode.

Everything is asked of the staged interpreter itself, in a chroot of the staging tree, so that the builder's
own Python version does not matter.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest.image.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S = 120
AGENT_ROOT = "/usr/lib/hako"
"""Directory of the guest in which the ``guest`` package lies."""

# Imports every module of the agent and reports the files behind all that is loaded then; the frozen start-up
# modules have no file unless the interpreter found its library, where it lists them too.
_LIST_MODULES = f"""
import sys, os
sys.path.insert(0, {AGENT_ROOT!r})
for file in sorted(os.listdir({AGENT_ROOT + "/guest/agent"!r})):
    if file.endswith(".py") and file != "__init__.py":
        __import__("guest.agent." + file[:-3])
files = {{getattr(module, "__file__", None) for module in list(sys.modules.values())}}
frozen = {{m.__file__ for m in list(sys.modules.values())
          if getattr(m.__spec__, "origin", None) == "frozen" and getattr(m, "__file__", None)}}
files = sorted((files - frozen - {{None}}) | {{os.__file__}})
import json
print(json.dumps(files))
"""

# Writes unchecked hash-based bytecode (PEP 552) beside each source: the guest never looks at sources.
_COMPILE = """
import _imp, importlib.util, json, marshal, sys
for path in json.loads(sys.stdin.read()):
    with open(path, "rb") as file:
        source = file.read()
    code = compile(source, path, "exec", dont_inherit=True, optimize=2)
    hash_ = _imp.source_hash(importlib.util._RAW_MAGIC_NUMBER, source)
    with open(path + "c", "wb") as file:
        file.write(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + hash_ + marshal.dumps(code))
"""


@dataclass(frozen=True, slots=True)
class PythonTree:
    """What the guest's interpreter needs.

    :param interpreter: path of the interpreter in the guest.
    :param bytecode: paths of compiled modules in the guest.
    :param extensions: paths of extension modules in the guest.
    """

    interpreter: str
    bytecode: tuple[str, ...]
    extensions: tuple[str, ...]


def compile_agent(staging: Path) -> PythonTree:
    """Compile the agent and the standard library modules that it imports.

    :param staging: a tree with an interpreter and the agent's sources under :data:`AGENT_ROOT`.
    :returns: the files the guest needs.
    :raises ImageError: if the staged interpreter cannot import or compile the agent.
    """
    interpreters = sorted((staging / "usr/bin").glob("python3.[0-9]*"))
    if not interpreters:
        raise ImageError("image: python: no interpreter among the packages; use Python 3.11 or newer")
    interpreter = f"/usr/bin/{interpreters[-1].name}"
    files = json.loads(_run(staging, interpreter, _LIST_MODULES, "null"))
    sources = [path for path in files if path.endswith(".py")]
    _run(staging, interpreter, _COMPILE, json.dumps(sources))
    return PythonTree(
        interpreter=interpreter,
        bytecode=tuple(f"{path}c" for path in sources),
        extensions=tuple(path for path in files if not path.endswith(".py")),
    )


def _run(staging: Path, interpreter: str, script: str, given: str) -> str:
    # -S keeps site out, as in the guest; a fixed hash seed keeps the bytecode reproducible.
    argv = ["chroot", str(staging), interpreter, "-S", "-B", "-X", "utf8", "-c", script]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        argv, input=given, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False
    )
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ImageError(f"image: python: {cause}; the agent does not load under {interpreter}")
    return done.stdout
