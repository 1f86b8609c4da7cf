"""A guest image whose agent serves as usual until its first container runs, and turns hostile then."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from guest.image import cpio, launcher
from guest.image.bytecode import START

if TYPE_CHECKING:
    from pathlib import Path

PARAMETER = "hostile="
"""Of the kernel's command line; what follows is the name of a function below."""

_PROGRAM = "/hostile.py"
_INTERPRETER = re.compile(rb"usr/bin/python3[.\d]*")

# It runs in the guest, before the agent, in a thread of the same process.
_SOURCE = f"""
import _thread, marshal, posix, sys, time

def read(path, most=1 << 22):
    file = posix.open(path, posix.O_RDONLY)
    try:
        return posix.read(file, most)
    finally:
        posix.close(file)

def frame(stream, kind, payload):
    return (len(payload).to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes([kind, 0]) + payload)

def junk(write):
    while True:
        write(read("/dev/urandom", 1 << 16))

def huge(write):
    # A frame that says it has two gigabytes, and has them.
    write(b"\\x7f\\xff\\xff\\xff" + frame(1, 2, b"")[4:])
    while True:
        write(bytes(1 << 20))

def large(write):
    # Each is as large as one may be, and answers a call that nobody has made.
    while True:
        write(frame(99999, 2, bytes((4 << 20) - 1)))

def many(write):
    block = b"".join(frame(number, 2, b"") for number in range(1, 20001, 2))
    while True:
        write(block)

def calls(write):
    # Only the host may call.
    block = frame(2, 1, b"\\x0a\\x03abc") * 1000
    while True:
        write(block)

def silent(write):
    # One byte of an answer in a second.
    for byte in frame(1, 2, bytes(1 << 20)):
        write(bytes([byte]))
        time.sleep(1)

def turn():
    while not hasattr(sys.modules.get("guest.agent.ttrpc"), "Connection"):
        time.sleep(0.01)
    module = sys.modules["guest.agent.ttrpc"]
    usual, started = module.Connection._handle, []
    def handle(self, peer, stream, request):
        if started:
            return  # from then on nothing is answered
        usual(self, peer, stream, request)
        if request.method == "StartContainer":
            started.append(True)
            line = read("/proc/cmdline").decode()
            mode = line.partition("{PARAMETER}")[2].split()[0]
            _thread.start_new_thread(globals()[mode], (self._transport.write,))
    module.Connection._handle = handle

_thread.start_new_thread(turn, ())
exec(marshal.loads(read({START!r})[16:]))  # PEP 552
"""


def write_initrd(image: Path, target: Path) -> None:
    """Write an initramfs with the hostile agent.

    :param image: the directory of a guest image.
    :param target: the file.
    """
    usual = (image / "initrd").read_bytes()
    found = _INTERPRETER.search(usual)
    assert found is not None
    argv = (f"/{found[0].decode()}", "-ISB", _PROGRAM)
    entries = [
        cpio.regular("/init", launcher.program(argv, ("LC_ALL=POSIX",)), mode=0o755),
        cpio.regular(_PROGRAM, _SOURCE.encode()),
    ]
    target.write_bytes(usual + cpio.archive(entries))
