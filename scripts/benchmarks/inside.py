"""A measuring program inside the guest, beside the agent, that takes orders on a vsock port.

The kernel unpacks several archives one over another, so the image is the usual one plus a few files.
Process 1 forks the program and then becomes the agent.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import cpio
from scripts.benchmarks.stage import MeasurementError

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage

PORT = 5000
TIMEOUT_S = 300.0
BLOCK_BYTES = 1 << 16
GUEST_INITRD = Path("/var/lib/hako/guest/initrd")
_INTERPRETER = re.compile(rb"(/[\w./-]+/python[\w.]*)\0-ISB\0")

# The guest has only those parts of Python that the agent needs.
_INIT = f"""
import _socket, fcntl, os, time

def sealed_crun():
    fd = os.memfd_create("crun", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)  # above the descriptors that crun gets
    with open("/usr/bin/crun", "rb", buffering=0) as file:
        os.sendfile(fd, file.fileno(), 0, os.fstat(file.fileno()).st_size)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return "/proc/self/fd/%d" % fd

def timed_exec(name):
    errors = os.memfd_create("errors")
    files = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
    files.append((os.POSIX_SPAWN_DUP2, errors, 2))
    argv = ["crun", "--cgroup-manager=cgroupfs", "exec", name, "true"]
    began = time.monotonic()
    pid = os.posix_spawn(crun, argv, os.environ, file_actions=files)
    status = os.waitpid(pid, 0)[1]
    took = time.monotonic() - began
    answer = b"%f" % took if status == 0 else b"status %d: %s" % (status, os.pread(errors, 1000, 0))
    os.close(errors)
    return answer

def serve(fd):
    words = b""
    while not words.endswith(b"\\n"):
        words += os.read(fd, 1)
    order, argument = words.decode().split()
    if order == "exec":
        os.write(fd, timed_exec(argument))
        return
    left, block = int(argument), memoryview(bytearray({BLOCK_BYTES}))
    if order == "echo":
        for _ in range(left):
            os.write(fd, os.read(fd, 1))
        return
    if order == "take":
        while left:
            left -= os.readv(fd, [block])
        os.write(fd, b"!")
        return
    zeros = os.open("/dev/zero", os.O_RDONLY)
    while left:
        size = os.readv(zeros, [block[:left]])
        left -= os.write(fd, block[:size])
    os.close(zeros)

def listen():
    while True:
        try:
            listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
            listener.bind((0xFFFFFFFF, {PORT}))
            listener.listen(4)
            return listener
        except OSError:
            time.sleep(0.1)  # the agent has not loaded the driver yet

if os.fork() == 0:
    crun = sealed_crun()  # before the agent has made its own copy and removes the file
    listener = listen()
    os.environ["PATH"] = "/usr/bin:/bin"
    while True:
        fd = listener._accept()[0]
        os.chroot("/..")  # orders come once the agent serves, when it has mounted its root over this one
        serve(fd)
        os.close(fd)
os.execv("/init", ["/init"])
"""


def configure(stage: Stage) -> None:
    """Let later sandboxes boot the image with the measuring program.

    :raises MeasurementError: if the image is not Hako's.
    """
    image = GUEST_INITRD.read_bytes()
    script = f"#!{interpreter(image)} -ISB\n{_INIT}"
    initrd = stage.home / "measuring-initrd"
    initrd.write_bytes(image + cpio.archive([cpio.regular("/measure", script.encode(), mode=0o755)]))
    stage.configure(
        hypervisor='channel = "vhost-user-vsock"\n',
        guest=f'initrd = "{initrd}"\nkernel_parameters = "rdinit=/measure"\n',
    )


def interpreter(image: bytes) -> str:
    """Find where Python is in the guest.

    :param image: the guest's initial RAM file system.
    :raises MeasurementError: if the image is none of Hako's.
    """
    found = _INTERPRETER.search(image)
    if found is None:
        raise MeasurementError(f"{GUEST_INITRD}: process 1 is not Hako's agent; run scripts/setup")
    return found[1].decode()


def ports(bundle: Path) -> Path:
    """Find the socket that leads to the ports of a container's guest.

    :param bundle: the container's, under Hako.
    """
    directory = (bundle / "hako").readlink()
    # A confined daemon has its own directory.
    own = directory / "vsock"
    return (own if own.exists() else directory) / "vsock.sock"


def time_crun_exec(ports: Path, container: str) -> float:
    """Let the guest run ``true`` in a container by ``crun exec``; return how long the guest says it took.

    :param ports: the socket that leads to the guest's ports.
    :param container: the container's id at the agent.
    :returns: seconds.
    :raises MeasurementError: if it fails.
    """
    with _order(ports, f"exec {container}") as connection:
        answer = b""
        while part := connection.recv(100):
            answer += part
    try:
        return float(answer)
    except ValueError as error:
        reason = answer.decode(errors="replace").strip()
        raise MeasurementError(f"crun exec: {container}: it failed in the guest: {reason}") from error


def receive(ports: Path, size: int) -> None:
    """Let the guest send bytes, and read them.

    :param ports: the socket that leads to the guest's ports.
    :param size: the number of bytes.
    :raises MeasurementError: if fewer bytes arrive.
    """
    left, buffer = size, bytearray(1 << 20)
    with _order(ports, f"send {size}") as connection:
        while left and (count := connection.recv_into(buffer)):
            left -= count
    if left:
        raise MeasurementError(f"channel: {left} of {size} bytes did not arrive")


def send(ports: Path, size: int) -> None:
    """Send bytes to the guest, until it has read them.

    :param ports: the socket that leads to the guest's ports.
    :param size: how many; a multiple of 1 MiB.
    :raises MeasurementError: if it does not read them.
    """
    block = bytes(1 << 20)
    with _order(ports, f"take {size}") as connection:
        for _ in range(size // len(block)):
            connection.sendall(block)
        if not connection.recv(1):
            raise MeasurementError(f"channel: the guest did not read {size} bytes")


def echo(ports: Path, count: int) -> None:
    """Send a byte to the guest and wait until it comes back, again and again.

    :param ports: the socket that leads to the guest's ports.
    :param count: how often.
    :raises MeasurementError: if one does not come back.
    """
    with _order(ports, f"echo {count}") as connection:
        for _ in range(count):
            connection.sendall(b"x")
            if not connection.recv(1):
                raise MeasurementError("channel: a byte did not come back")


def _order(ports: Path, order: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(str(ports))
    connection.sendall(f"CONNECT {PORT}\n".encode())
    reply = b""
    while not reply.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            connection.close()
            raise MeasurementError(f"channel: port {PORT}: the guest's measuring program does not listen")
        reply += byte
    connection.sendall(f"{order}\n".encode())
    return connection
