"""A bind mount and the mounts below it have the same flags as under runc."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.bundled import bind, run, unpacked
from tests.e2e.busybox import BUSYBOX, IMAGE
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

FLAGS = {"ro", "nosuid", "nodev", "noexec", "noatime"}


@dataclass(frozen=True)
class Case:
    """A bind mount.

    :param source: which of the host's directories it shows.
    :param options: of the specification.
    :param flags: what it has.
    :param inner: what is mounted below it has, if that is seen.
    """

    source: str
    options: tuple[str, ...]
    flags: set[str]
    inner: set[str] | None = None


GUARDED = {"nosuid", "nodev", "noexec", "noatime"}
INNER = {"ro", "nosuid", "nodev"}
CASES = {
    "plain": Case("guarded", ("rbind",), GUARDED, INNER),
    "rw": Case("guarded", ("rbind", "rw", "rprivate"), GUARDED, INNER),
    "rslave": Case("guarded", ("rbind", "rw", "rslave"), GUARDED, INNER),
    "ro": Case("guarded", ("rbind", "ro"), {"ro", "noatime"}, INNER),
    "rro": Case("guarded", ("rbind", "rro"), GUARDED | {"ro"}, INNER),
    "exec": Case("guarded", ("rbind", "exec", "suid", "dev"), GUARDED, INNER),
    "bind": Case("guarded", ("bind", "nosuid"), {"nosuid", "noatime"}),
    "read": Case("read", ("rbind", "rw"), {"ro"}),
    "rnoexec": Case("open", ("rbind", "rprivate", "rnoexec"), {"noexec"}, {"noexec", "nosuid"}),
}


def mount(*arguments: str | Path) -> None:
    subprocess.run(["/usr/bin/mount", *arguments], check=True)


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    with unpacked(home) as directory:
        outer = [directory / name for name in ("guarded", "read", "open")]
        inner = [directory / "guarded" / "in", directory / "open" / "in"]
        for each, options in zip(
            [*outer, *inner],
            [",".join(GUARDED), "rw", "rw", ",".join(INNER), "nosuid"],
            strict=True,
        ):
            each.mkdir()
            mount("-t", "tmpfs", "-o", options, "tmpfs", each)
            if each in outer:
                (each / "sh").write_bytes(BUSYBOX.read_bytes())
                (each / "sh").chmod(0o755)
        mount("-o", "remount,bind,ro", directory / "read")
        yield directory
        for each in [*inner, *outer]:
            subprocess.run(["/usr/bin/umount", each], check=True)


def test_a_bind_mount_has_the_flags_that_runc_gives_it(either_stack: Stack, place: Path) -> None:
    mounts = [bind(place / case.source, f"/{name}", *case.options) for name, case in CASES.items()]
    script = (
        "while read -r _ _ _ _ point options _; do echo $point $options; done < /proc/self/mountinfo",
        *(f"/{name}/sh -c 'echo {name}-runs' 2>&1" for name in CASES),
        *(f"(echo x > /{name}/file) 2>/dev/null && echo {name}-written" for name in CASES),
        "true",
    )
    lines = run(either_stack, place, *script, mounts=mounts).splitlines()
    flags = {words[0]: FLAGS & set(words[1].split(",")) for line in lines if len(words := line.split()) == 2}
    for name, case in CASES.items():
        assert flags[f"/{name}"] == case.flags, name
        assert flags.get(f"/{name}/in") == case.inner, name
        assert (f"{name}-runs" in lines) is ("noexec" not in case.flags), name
        assert (f"{name}-written" in lines) is ("ro" not in case.flags), name


def test_the_share_is_mounted_without_devices_and_set_id_programs(one_stack: Stack, place: Path) -> None:
    containerd, name = one_stack.containerd, new_id()
    volume = f"type=bind,src={place},dst=/volume,options=rbind:rw"
    done = containerd.ctr(
        "run", "-d", "--runtime", containerd.runtime, "--mount", volume, IMAGE, name, "sleep", "99"
    )
    assert done.code == 0, done.stderr
    try:
        machine = containerd.tasks()[name][0]
        shim = Path(f"/proc/{machine}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        table = Path(f"/proc/{shim}/mountinfo").read_text(encoding="utf-8")
    finally:
        containerd.remove(name)
    shown = [
        line.split()[4:6] for line in table.splitlines() if str(one_stack.state_directory) in line.split()[4]
    ]
    flags = {point: set(options.split(",")) for point, options in shown}
    given = [
        point for point in flags if point.endswith("/rootfs") or "/.volumes/" in point or "volume" in point
    ]
    assert given
    assert all({"nosuid", "nodev"} <= flags[point] for point in given), flags
