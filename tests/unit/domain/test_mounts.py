"""Mount options become the arguments of mount(2)."""

from __future__ import annotations

import pytest

from shim.mounts import MountOptions, parse_options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], MountOptions(0, "")),
        (["ro"], MountOptions(1, "")),
        (["ro", "rw"], MountOptions(0, "")),
        (["nosuid", "nodev", "noexec"], MountOptions(2 | 4 | 8, "")),
        (["rbind", "ro"], MountOptions(4096 | 16384 | 1, "")),
        (
            ["lowerdir=/a:/b", "upperdir=/c", "index=off"],
            MountOptions(0, "lowerdir=/a:/b,upperdir=/c,index=off"),
        ),
        (["ro", "size=64k"], MountOptions(1, "size=64k")),
    ],
)
def test_flags_and_data_are_told_apart(options: list[str], expected: MountOptions) -> None:
    assert parse_options(options) == expected
