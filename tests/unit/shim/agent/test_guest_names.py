"""A container's id never collides with a name that the guest or another container uses."""

from __future__ import annotations

import re

import pytest

from shim.agent import guest_names
from shim.agent.guest_paths import MODULES_NAME, WATCHABLE_NAME
from shim.identifiers import check_identifier

KATAS_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
"""The ids that Kata's agent accepts."""
GUESTS_OWN = (
    MODULES_NAME,
    WATCHABLE_NAME,
    "sandbox",
    "shared",
    "image",
    "+sandbox",
    "+ahead",
    "cgroup.procs",
)
IDS = ("a", "7", "A", "a-", "a--", "a.b", "a_b", "a-0123456789abcdef-a", "x" * 76, *GUESTS_OWN[1:5])
identifiers = pytest.mark.parametrize("identifier", IDS)


@identifiers
def test_containerd_may_use_the_id(identifier: str) -> None:
    check_identifier(identifier, phase="create", what="id")


@identifiers
def test_katas_agent_accepts_the_name(identifier: str) -> None:
    assert KATAS_ID.fullmatch(guest_names.agent_id(identifier))


@identifiers
def test_the_name_leads_back_to_the_container(identifier: str) -> None:
    assert guest_names.container_id(guest_names.agent_id(identifier)) == identifier


def test_names_in_the_share_are_unique() -> None:
    volumes = [guest_names.volume_in_share(number, label) for number, label in enumerate([*IDS, *IDS])]
    names = [*GUESTS_OWN, *map(guest_names.agent_id, IDS), *volumes]
    assert len(names) == len(set(names))
