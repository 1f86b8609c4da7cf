"""The filter of system calls, interpreted as the kernel would."""

from __future__ import annotations

import errno
import struct

import pytest

from hypervisor.seccomp import confining, refused_calls

ALLOW, KILL, ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
X86_64, I386 = 0xC000003E, 0x40000003
CLONE_THREAD_OF_A_PROGRAM = 0x3D0F00
SOCKETPAIR, CONNECT, PRCTL, MMAP, MEMFD_CREATE = 53, 42, 157, 9, 319
READ, SOCKET, CLONE, UNSHARE, CLONE3, SETRESUID, MKNODAT = 0, 41, 56, 272, 435, 117, 259


def run(code: bytes, number: int, *arguments: int, architecture: int = X86_64) -> int:
    """Interpret a filter, which consists of loads, three kinds of comparison, and returns."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *(0,) * (6 - len(arguments)))
    program = list(struct.iter_unpack("=HBBI", code))
    accumulator, place = 0, 0
    while True:
        operation, if_true, if_false, value = program[place]
        place += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x06:
                return int(value)
            case 0x15 | 0x25 | 0x45:
                tests = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: accumulator & value}
                place += if_true if tests[operation] else if_false
            case _:
                pytest.fail(f"unknown operation {operation:#x}")


@pytest.fixture(params=[True, False], ids=["acts as others", "keeps its identity"])
def changes_identity(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def code(changes_identity: bool) -> bytes:
    return confining(changes_identity=changes_identity).code


def test_dangerous_system_calls_are_refused_and_others_allowed(code: bytes, changes_identity: bool) -> None:
    refused = set(refused_calls(changes_identity=changes_identity).values())
    looked_at = {SOCKET, SOCKETPAIR, CLONE, UNSHARE, CLONE3}
    for number in (set(range(463)) - looked_at) | refused:
        assert run(code, number) == (ERRNO | errno.EPERM if number in refused else ALLOW), number


def test_only_the_virtio_fs_daemon_may_change_its_user(code: bytes, changes_identity: bool) -> None:
    expected = ALLOW if changes_identity else ERRNO | errno.EPERM
    assert {run(code, number) for number in (SETRESUID, MKNODAT)} == {expected}


def test_the_virtio_fs_daemon_makes_no_sockets_as_it_could_act_as_root_on_others(
    code: bytes, changes_identity: bool
) -> None:
    expected = ERRNO | errno.EPERM if changes_identity else ALLOW
    assert {run(code, number, 1) for number in (SOCKET, SOCKETPAIR, CONNECT)} == {expected}


@pytest.mark.parametrize("number", [463, 1000, 0x4000_0000, 0x4000_0000 | READ])
def test_an_unknown_method_is_unimplemented(code: bytes, number: int) -> None:
    assert run(code, number) == ERRNO | errno.ENOSYS


def test_a_system_call_of_another_architecture_kills_the_process(code: bytes) -> None:
    assert run(code, READ, architecture=I386) == KILL


@pytest.mark.parametrize(
    ("number", "argument", "answer"),
    [
        pytest.param(SOCKET, 2, ERRNO | errno.EPERM, id="inet socket"),
        pytest.param(SOCKET, 40, ERRNO | errno.EPERM, id="vsock socket"),
        pytest.param(SOCKETPAIR, 2, ERRNO | errno.EPERM, id="other pair"),
        pytest.param(CLONE, CLONE_THREAD_OF_A_PROGRAM, ALLOW, id="thread"),
        pytest.param(CLONE, 17, ERRNO | errno.EPERM, id="fork"),
        pytest.param(
            CLONE, 0x2_0000 | CLONE_THREAD_OF_A_PROGRAM, ERRNO | errno.EPERM, id="thread with its own mounts"
        ),
        pytest.param(CLONE, 0x1000_0000 | 17, ERRNO | errno.EPERM, id="user namespace"),
        pytest.param(CLONE, 0x2_0000 | 17, ERRNO | errno.EPERM, id="mount namespace"),
        pytest.param(UNSHARE, 0x200, ALLOW, id="own working directory"),
        pytest.param(UNSHARE, 0x4000_0000, ERRNO | errno.EPERM, id="network namespace"),
        pytest.param(UNSHARE, 0x80, ERRNO | errno.EPERM, id="time namespace"),
        pytest.param(PRCTL, 1, ERRNO | errno.EPERM, id="death signal"),
        pytest.param(PRCTL, 15, ALLOW, id="name of a thread"),
        pytest.param(CLONE3, 0, ERRNO | errno.ENOSYS, id="clone3"),
    ],
)
def test_some_calls_are_allowed_only_with_certain_arguments(
    code: bytes, number: int, argument: int, answer: int
) -> None:
    assert run(code, number, argument) == answer


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        pytest.param(MMAP, (0, 1 << 21, 3, 0x4_0022), id="mapping"),
        pytest.param(MEMFD_CREATE, (0, 0x4), id="file"),
    ],
)
@pytest.mark.parametrize("may", [True, False])
def test_only_a_qemu_that_is_given_huge_pages_may_use_those_of_the_host(
    number: int, arguments: tuple[int, ...], may: bool
) -> None:
    code = confining(changes_identity=False, huge_pages=may).code
    assert run(code, number, *arguments) == (ALLOW if may else ERRNO | errno.EPERM)
    assert run(code, number, *arguments[:-1], 0x22 if number == MMAP else 0) == ALLOW
