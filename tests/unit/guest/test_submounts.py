"""The kernel's virtio-fs module checks access control lists on mounts below a share, too."""

from __future__ import annotations

import struct

import pytest

from guest.image.submounts import are_lists_checked, check_lists
from tests.unit.guest.test_image_parts import relocatable

ACTIVE = bytes.fromhex("48814b5000000040")  # orq $0x40000000,0x50(%rbx)
ACTIVE_WITH_LISTS = bytes.fromhex("48814b5000000140")
OTHER = bytes.fromhex("48814b5000000004")
NAME = b"\0other\0fuse_get_tree_submount\0"


def built(code: bytes, *, name: bytes = b"fuse_get_tree_submount") -> bytes:
    """Build an object in which the function of a given name follows another one."""
    before = b"\x90" * 16 + ACTIVE
    symbols = bytes(24) + struct.pack("<IBBHQQ", NAME.index(name), 2, 0, 1, len(before), len(code))
    return relocatable({".text": before + code + ACTIVE, ".symtab": symbols, ".strtab": NAME})


def test_the_flag_is_set_only_in_that_function() -> None:
    given = built(b"\x90" + ACTIVE + b"\xc3")

    changed = check_lists(given)

    assert changed == built(b"\x90" + ACTIVE_WITH_LISTS + b"\xc3")
    assert (are_lists_checked(given), are_lists_checked(changed)) == (False, True)
    assert check_lists(changed) == changed


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(built(b"\x90\xc3"), id="no such instruction"),
        pytest.param(built(OTHER), id="another flag"),
        pytest.param(built(ACTIVE + ACTIVE), id="two of them"),
        pytest.param(built(ACTIVE, name=b"other"), id="another function"),
    ],
)
def test_a_module_of_an_unknown_build_is_left_unchanged(given: bytes) -> None:
    assert check_lists(given) == given
    assert not are_lists_checked(given)
