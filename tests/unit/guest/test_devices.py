"""A container's host disks get the guest's device numbers."""

from __future__ import annotations

from typing import Any

import pytest

from guest.agent import devices
from guest.agent.errors import AgentError


def disk(path: str, major: int, minor: int) -> dict[str, Any]:
    return {"path": path, "type": "b", "major": major, "minor": minor}


def rule(*, allow: bool = True, access: str = "rw", **number: int) -> dict[str, Any]:
    return {"allow": allow, "type": "b", "access": access, **number}


def test_a_disk_and_its_rules_get_the_guests_numbers() -> None:
    deny = {"allow": False, "type": "a", "access": "rwm"}
    linux = {
        "devices": [disk("/dev/data", 8, 0), disk("/dev/other", 8, 16)],
        "resources": {"devices": [deny, rule(major=8), rule(major=8, minor=16, access="r")]},
    }
    devices.renumber(linux, {"/dev/data": (254, 0)})
    assert linux["devices"] == [disk("/dev/data", 254, 0), disk("/dev/other", 8, 16)]
    # The guest's number 0 must be written: without a number, the rule would allow every disk.
    assert linux["resources"]["devices"] == [  # type: ignore[index]  # a dict of lists, as above
        deny,
        rule(major=254, minor=0),
        rule(major=8, minor=16, access="r"),
    ]


def test_two_disks_may_swap_their_numbers() -> None:
    linux = {
        "devices": [disk("/dev/a", 254, 0), disk("/dev/b", 254, 16)],
        "resources": {"devices": [rule(major=254, access="r"), rule(major=254, minor=16)]},
    }
    devices.renumber(linux, {"/dev/a": (254, 16), "/dev/b": (254, 0)})
    assert linux["resources"]["devices"] == [  # type: ignore[index]  # a dict of lists, as above
        rule(major=254, minor=16, access="r"),
        rule(major=254, minor=0),
    ]


def test_a_disk_without_a_rule_gets_one_if_other_devices_have_rules() -> None:
    deny = {"allow": False, "type": "a", "access": "rwm"}
    linux = {"devices": [disk("/dev/a", 8, 0)], "resources": {"devices": [deny]}}
    devices.renumber(linux, {"/dev/a": (254, 32)})
    assert linux["resources"]["devices"] == [  # type: ignore[index]  # a dict of lists, as above
        deny,
        rule(major=254, minor=32, access="rwm"),
    ]


def test_a_disk_that_the_specification_does_not_list_is_refused() -> None:
    with pytest.raises(AgentError, match="/dev/a: not among the specification's devices"):
        devices.renumber({"devices": []}, {"/dev/a": (254, 0)})
