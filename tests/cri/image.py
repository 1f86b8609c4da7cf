"""Make the image of the tests' pods: busybox, and a Python just large enough for the peer program."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tests.e2e import busybox

IMAGE = "hako.test/pod:1"
PAUSE_IMAGE = "hako.test/pause:1"
PORT = 7000
PEER = Path(__file__).with_name("peer.py")
PYTHON = Path("/usr/bin/python3").resolve()
SHARING = Path(__file__).with_name("sharing.py")
PEER_COMMAND = (str(PYTHON), "-IS", "/peer.py")
"""Runs the peer program in a container; its verb and arguments follow."""
SHARING_COMMAND = (str(PYTHON), "-IS", "/sharing.py")
"""Runs the program that meets another through a volume; its verb and directories follow."""

# Compile what the interpreter and the programs import, and name the directory of the standard library.
_COLLECT = """
import encodings.idna, hashlib, json, os, py_compile, runpy, sys, sysconfig
for program in sys.argv[2:]:
    runpy.run_path(program, run_name="imported")
origins = {getattr(getattr(m, "__spec__", None), "origin", None) or "" for m in list(sys.modules.values())}
origins.add(os.__file__)
for origin in origins:
    if origin.endswith(".py"):
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(origin, f"{sys.argv[1]}{origin}c", doraise=True, invalidation_mode=mode)
print(json.dumps([sysconfig.get_path("stdlib"), [o for o in origins if o.endswith(".so")]]))
"""


def _libraries(program: Path) -> set[Path]:
    listing = subprocess.run(["/usr/bin/ldd", program], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", listing)}


def peer_layer() -> bytes:
    """Return a tar archive of the interpreter, what it needs, and the programs."""
    with tempfile.TemporaryDirectory() as directory:
        argv: list[str | Path] = [PYTHON, "-IS", "-c", _COLLECT, directory, PEER, SHARING]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        compiled = {path.relative_to(directory): path.read_bytes() for path in Path(directory).rglob("*.pyc")}
    standard_library, extensions = json.loads(done.stdout)
    programs = {PYTHON, *map(Path, extensions)}
    files = programs.union(*map(_libraries, programs))
    contents = {path.relative_to("/"): path.read_bytes() for path in files} | compiled
    contents |= {Path(program.name): program.read_bytes() for program in (PEER, SHARING)}
    # The interpreter looks for this directory to find out where it is.
    contents[Path(standard_library, "lib-dynload", "README").relative_to("/")] = b""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in sorted(contents.items()):
            busybox.add(archive, str(path), content=content, mode=0o755)
    return buffer.getvalue()


def write_images(directory: Path) -> list[Path]:
    """Write the archives of the pods' image and of the pause image, whose command blocks.

    :param directory: where to write them.
    :returns: their paths.
    """
    pod, pause = directory / "pod.tar", directory / "pause.tar"
    base = busybox.rootfs_archive()
    busybox.write_image(pod, name=IMAGE, layers=(base, peer_layer()))
    busybox.write_image(pause, name=PAUSE_IMAGE, layers=(base,), command=("sleep", "2147483647"))
    return [pod, pause]
