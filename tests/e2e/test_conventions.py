"""runc's conventions for fields that a specification leaves out or fills in an odd way."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import new_id
from tests.e2e.containerd import ATTEMPTS_OF_RUNC
from tests.e2e.described import Described, specification, unpack_rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

UNKNOWN = {"uid": 4321, "gid": 4321}
NOBODY = {"uid": 65534, "gid": 65534}
OWN_HOME = "tr '\\0' '\\n' </proc/$$/environ | grep ^HOME="


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A root file system, and room for what processes say."""
    with tempfile.TemporaryDirectory(dir=home, prefix="conventions-") as directory:
        unpack_rootfs(Path(directory, "rootfs"))
        yield Path(directory)


@pytest.fixture(scope="module")
def odd(either_stack: Stack, place: Path) -> Iterator[Described]:
    """A container whose init asks for unusual things."""
    containerd, name = either_stack.containerd, new_id()
    config = place / f"{name}.json"
    spec = specification(
        place / "rootfs",
        args=["sleep", "100000"],
        env=["PATH=/bin", "A=1", "HOME=", "B=2", "A=3", "C="],
        cwd=f"/made/for/{name}",
        user={**UNKNOWN, "additionalGids": [5, 6], "umask": 0o027},
        rlimits=[{"type": "RLIMIT_NOFILE", "soft": 512, "hard": 2048}],
        oomScoreAdj=321,
        noNewPrivileges=True,
    )
    config.write_text(json.dumps(spec))
    started = containerd.ctr("run", "--runtime", containerd.runtime, "--detach", "--config", config, name)
    try:
        assert started.code == 0, started.stderr
        yield Described(either_stack, name, place)
    finally:
        containerd.remove(name)


def test_the_last_value_of_a_variable_counts_and_an_empty_home_is_found(odd: Described) -> None:
    said = odd.shell("tr '\\0' '\\n' </proc/1/environ", user=UNKNOWN)
    assert sorted(said.split()) == ["A=3", "B=2", "C=", "HOME=/", "PATH=/bin"]


def test_a_working_directory_that_is_missing_is_made(odd: Described) -> None:
    directory = f"/made/for/{odd.name}"
    said = odd.shell(f"readlink /proc/1/cwd; stat -c '%u %g %a' /made {directory}", user=UNKNOWN)
    assert said == f"{directory}\n" + "0 0 755\n" * 2


@pytest.mark.parametrize(
    ("user", "env", "found"),
    [
        ({"uid": 0, "gid": 0}, ["PATH=/bin"], "/root"),
        ({"uid": 0, "gid": 0}, ["PATH=/bin", "HOME="], "/root"),
        ({"uid": 0, "gid": 0}, ["PATH=/bin", "HOME=/x"], "/x"),
        (NOBODY, ["PATH=/bin", "HOME="], "/"),
        (UNKNOWN, ["PATH=/bin"], "/"),
        (UNKNOWN, ["HOME=/a", "PATH=/bin", "HOME="], "/"),
    ],
)
def test_the_home_of_an_exec_is_that_of_its_user(
    odd: Described, user: dict[str, Any], env: list[str], found: str
) -> None:
    assert odd.shell(OWN_HOME, user=user, env=env) == f"HOME={found}\n"


def test_a_user_who_is_added_later_has_a_home(odd: Described) -> None:
    odd.shell("echo late:x:77:77::/home/late:/bin/sh >>/etc/passwd")
    assert odd.shell(OWN_HOME, user={"uid": 77, "gid": 77}) == "HOME=/home/late\n"


def test_an_exec_has_the_oom_score_of_its_container_and_not_its_own(
    odd: Described,
) -> None:
    show = "cat /proc/1/oom_score_adj /proc/self/oom_score_adj"
    assert odd.shell(show) == odd.shell(show, oomScoreAdj=5) == "321\n321\n"


def test_the_mask_of_new_files_is_that_of_the_container(odd: Described) -> None:
    assert odd.shell("grep Umask /proc/1/status") == "Umask:\t0027\n"
    if odd.stack.is_hako:  # and for runc from 1.2 on
        assert odd.shell("umask", user={"uid": 0, "gid": 0, "umask": 0o077}) == "0027\n"


def test_an_exec_has_its_own_user_groups_and_privileges_and_no_limit_of_the_container(odd: Described) -> None:
    user = {"uid": 1000, "gid": 1001, "additionalGids": [7, 8]}
    said = odd.shell("id -u; id -g; grep -e Groups -e NoNewPrivs /proc/self/status; ulimit -n", user=user)
    assert re.fullmatch(r"1000\n1001\nGroups:\t7 8 \nNoNewPrivs:\t0\n(\d+)\n", said)
    assert said.split()[-1] != "512"


def test_a_user_may_open_their_own_streams_again(odd: Described) -> None:
    command = ("sh", "-c", "echo out >/dev/stdout; echo err >/dev/stderr")
    _, said = odd.exec(*command, user=UNKNOWN)
    for _ in range(0 if odd.stack.is_hako else ATTEMPTS_OF_RUNC):
        said = said if len(said.split()) > 1 else odd.exec(*command, user=UNKNOWN)[1]
    assert sorted(said.split()) == ["err", "out"]


@pytest.mark.parametrize(
    ("args", "process", "cause"),
    [
        (["nope"], {}, r'exec: "nope": executable file not found in \$PATH'),
        ([""], {}, r'exec: "": executable file not found in \$PATH'),
        (["sh"], {"env": []}, r'exec: "sh": executable file not found in \$PATH'),
        (["/etc/passwd"], {}, r'exec: "/etc/passwd": permission denied'),
        (["/etc"], {}, r'exec: "/etc": (permission denied|is a directory)'),
        (["/etc/passwd/x"], {}, r'exec: "/etc/passwd/x": .*not a directory'),
        ([], {}, r"args"),
        (["true"], {"cwd": "/no/such"}, r"no such file or directory"),
        (["true"], {"cwd": "/etc/passwd"}, r"not a directory"),
        (["true"], {"cwd": "tmp"}, r"[Cc]wd.* must be an absolute path"),
        (["true"], {"cwd": ""}, r"[Cc]wd"),
        (["true"], {"env": ["PATH=/bin", "A"]}, r"invalid environment variable"),
        (["true"], {"env": ["PATH=/bin", ""]}, r"invalid environment variable"),
        (["true"], {"env": ["PATH=/bin", "=a"]}, r"environment variable"),
        (["true"], {"user": {"uid": 4294967295, "gid": 0}}, r"user"),
        (["true"], {"user": {"uid": 0, "gid": 4294967295}}, r"user"),
        (["true"], {"rlimits": [{"type": "RLIMIT_FOO", "soft": 1, "hard": 1}]}, r"rlimit.* .?RLIMIT_FOO"),
        (["true"], {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}]}, r"invalid argument"),
    ],
    ids=str,
)
def test_a_bad_command_is_refused_in_the_same_words(
    odd: Described, args: list[str], process: dict[str, Any], cause: str
) -> None:
    assert re.search(cause, odd.refusal(*args, **process))
