"""The Python part of the image: which standard library modules the agent imports, and their bytecode.

The staged interpreter itself gives all answers, in a chroot of the staging tree, so that the builder's own
Python version does not matter.
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
"""Directory of the staging tree in which the ``guest`` package lies."""
BUNDLE = f"{AGENT_ROOT}/modules"
"""File of the guest with the agent and all that it imports: one code object, to be executed."""
START = f"{AGENT_ROOT}/start.pyc"
"""The program for the interpreter: it executes the bundle."""

# Imports every module of the agent, and notes those that the interpreter has to look for, each after the
# modules that it imports itself. The interpreter finds its library by the file of os, which it may never
# read.
_LIST_MODULES = f"""
import sys
known = set(sys.modules)
import importlib.machinery, json, os
for name in set(sys.modules) - known: del sys.modules[name]
found = []
class Noting:
    def __init__(self, loader): self._loader = loader
    def create_module(self, spec): return self._loader.create_module(spec)
    def exec_module(self, module):
        self._loader.exec_module(module)
        spec = module.__spec__
        found.append([spec.name, spec.origin, spec.submodule_search_locations is not None])
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        for finder in (importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter):
            if finder.find_spec(name, path, target): return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None: spec.loader = Noting(spec.loader)
        return spec
sys.meta_path.insert(0, Finder)
sys.path.insert(0, {AGENT_ROOT!r})
for file in sorted(os.listdir({AGENT_ROOT + "/guest/agent"!r})):
    if file.endswith(".py") and file != "__init__.py":
        __import__("guest.agent." + file[:-3])
print(json.dumps([os.__file__, found]))
"""

# Runs the modules, each after those that it imports, without looking for them. An entry is a module's name,
# whether it is a package, and its code, or the path of an extension module.
_RUN = f"""
import _imp, posix, sys
class Spec:
    def __init__(self, name, origin):
        self.name = name
        self.origin = origin
def run(bundle):
    # Each module's code goes when it has run: what it defined is enough.
    bundle.reverse()
    while bundle:
        name, package, code = bundle.pop()
        if isinstance(code, str):
            module = sys.modules[name] = _imp.create_dynamic(Spec(name, code))
            _imp.exec_dynamic(module)
        else:
            module = sys.modules[name] = type(sys)(name)
            module.__package__ = name if package else name.rpartition(".")[0]
            exec(code, module.__dict__)
        parent = sys.modules.get(name.rpartition(".")[0])
        if parent:
            setattr(parent, name.rpartition(".")[2], module)
run("BUNDLE")
# Its pages are memory, and it is not read again.
posix.unlink({BUNDLE!r})
posix.close(bundle)
sys.modules["guest.agent.main"].main()
"""

# The interpreter looks for this module before it runs anything. It replaces the library's package with its
# hundreds of encodings, because the guest uses only UTF-8.
_ENCODINGS = """
import codecs
class Encoder(codecs.IncrementalEncoder):
    def encode(self, text, final=False):
        return codecs.utf_8_encode(text, self.errors)[0]
class Decoder(codecs.BufferedIncrementalDecoder):
    _buffer_decode = codecs.utf_8_decode
def search(name):
    if name not in ("utf_8", "utf-8", "utf8"):
        return None
    return codecs.CodecInfo(
        name="utf-8", encode=codecs.utf_8_encode, decode=codecs.utf_8_decode,
        incrementalencoder=Encoder, incrementaldecoder=Decoder,
    )
codecs.register(search)
"""

_START = f"""
import marshal, posix
bundle = posix.open({BUNDLE!r}, posix.O_RDONLY | posix.O_CLOEXEC)
exec(marshal.loads(posix.read(bundle, posix.fstat(bundle).st_size)))
"""

# Writes unchecked hash-based bytecode (PEP 552), because the guest never looks at sources. All modules of the
# agent go into one file: under emulation, finding and loading a module takes ten times as long as running its
# code. The library's os becomes an empty file, because the interpreter contains its code.
_COMPILE = f"""
import importlib.util, json, marshal, sys
def compiled(path):
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec", dont_inherit=True, optimize=2)
def write(path, source):
    code = compile(source, path, "exec", dont_inherit=True, optimize=2)
    with open(path, "wb") as file:
        file.write(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(code))
library, found = json.loads(sys.stdin.read())
write(library + "/os.pyc", "")
write(library + "/encodings/__init__.pyc", {_ENCODINGS!r})
write({START!r}, {_START!r})
modules = [(name, package, compiled(path) if path.endswith(".py") else path) for name, path, package in found]
code = compile({_RUN!r}, "run", "exec", dont_inherit=True, optimize=2)
# The modules are a constant of the code that runs them: one object, unmarshalled at once.
code = code.replace(co_consts=tuple(modules if one == "BUNDLE" else one for one in code.co_consts))
with open({BUNDLE!r}, "wb") as file:
    file.write(marshal.dumps(code))
"""


@dataclass(frozen=True, slots=True)
class PythonTree:
    """The files that the guest's interpreter needs.

    :param interpreter: path of the interpreter in the guest.
    :param bytecode: paths of compiled modules in the guest, the bundle among them.
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
    landmark, found = json.loads(_run(staging, interpreter, _LIST_MODULES, "null"))
    library = landmark.removesuffix("/os.py")
    _run(staging, interpreter, _COMPILE, json.dumps([library, found]))
    return PythonTree(
        interpreter=interpreter,
        bytecode=(f"{library}/os.pyc", f"{library}/encodings/__init__.pyc", START, BUNDLE),
        extensions=tuple(path for _name, path, _package in found if not path.endswith(".py")),
    )


def _run(staging: Path, interpreter: str, script: str, given: str) -> str:
    # -S keeps site out, as in the guest; a fixed hash seed keeps the bytecode reproducible.
    # Column numbers are only for error reports, which are not shown.
    options = ["-S", "-B", "-X", "utf8", "-X", "no_debug_ranges"]
    argv = ["chroot", str(staging), interpreter, *options, "-c", script]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        argv, input=given, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False
    )
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ImageError(f"image: python: {cause}; the agent does not load under {interpreter}")
    return done.stdout
