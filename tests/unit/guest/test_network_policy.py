"""The guest's rules and parameters follow the host's requests; rules and values of others stay."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from guest.agent import rtnetlink, sysctl
from guest.agent.rules import Rules
from guest.agent.wire import Codec, Message
from guest.image import schema
from shim.network.rtnetlink import attribute
from shim.network.rules import USUAL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CODEC = Codec(schema.messages())
HEADER = struct.Struct("=BBBBBBBBI")
OWN = HEADER.pack(2, 0, 0, 0, 254, 0, 0, 1, 0) + attribute(6, struct.pack("=I", 50)) + attribute(21, b"\4")


def rule(body: bytes, text: str = "rule") -> Message:
    return CODEC.new("hako.Rule", body=body, text=text)


class Kernel:
    """Stores rules as the kernel does: with empty attributes, and in another order."""

    def __init__(self, *bodies: bytes) -> None:
        self.rules = list(bodies)
        self.refuses = 0

    def dump(self, kind: int, request: bytes, *, decode: Callable[[bytes], bytes]) -> list[bytes]:
        assert kind == rtnetlink.RTM_GETRULE
        nothing = attribute(14, b"\xff" * 4) + attribute(18, b"")
        return [
            decode(body[: HEADER.size] + nothing + body[HEADER.size :])
            for body in self.rules
            if body[0] == request[0]
        ]

    def change(self, kind: int, body: bytes, *, flags: int = 0) -> None:
        if self.refuses:
            raise OSError(self.refuses, "it does not want to")
        if kind == rtnetlink.RTM_NEWRULE:
            assert flags == 0x600
            self.rules.append(body)
        elif body in self.rules:
            self.rules.remove(body)
        else:
            raise OSError(errno.ENOENT, "there is none")


def test_the_hosts_rules_replace_only_its_old_rules_and_the_kernels() -> None:
    first = [one.body for one in USUAL]
    others = HEADER.pack(2, 0, 0, 0, 99, 0, 0, 1, 0) + attribute(21, b"\3")
    kernel, rules = Kernel(*first, others), Rules()

    assert rules.update(kernel, [rule(body) for body in [*first[1:], OWN]]) == []  # type: ignore[arg-type]
    assert sorted(kernel.rules) == sorted([*first[1:], OWN, others])

    assert rules.update(kernel, [rule(body) for body in first]) == []  # type: ignore[arg-type]
    assert sorted(kernel.rules) == sorted([*first, others])


def test_a_rule_that_the_kernel_refuses_is_named() -> None:
    kernel, rules = Kernel(), Rules()
    kernel.refuses = errno.EINVAL
    assert rules.update(kernel, [rule(OWN, "rule 50")]) == ["rule 50: it does not want to"]  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysctl, "_ROOT", str(tmp_path))
    return tmp_path


def test_parameters_are_reset_when_the_host_stops_asking_for_them(root: Path) -> None:
    (root / "net").mkdir()
    for name in ("a", "b"):
        (root / "net" / name).write_text("1", encoding="ascii")
    settings = sysctl.Settings()

    assert settings.update({"net/a": "2", "net/b": "3"}) == []
    assert [(root / "net" / name).read_text(encoding="ascii") for name in ("a", "b")] == ["2", "3"]

    assert settings.update({"net/b": "4"}) == []
    assert [(root / "net" / name).read_text(encoding="ascii") for name in ("a", "b")] == ["1", "4"]


def test_a_containers_value_stays_until_the_host_asks_for_another(root: Path) -> None:
    (root / "net").mkdir()
    files = [root / "net" / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text("1", encoding="ascii")
    settings = sysctl.Settings()
    settings.update({"net/a": "2", "net/b": "2", "net/c": "2"})
    for file in files:
        file.write_text("9", encoding="ascii")

    settings.update({"net/a": "2", "net/b": "3"})

    assert [file.read_text(encoding="ascii") for file in files] == ["9", "3", "9"]


def test_a_new_link_gets_the_parameters_of_its_predecessor_of_that_name(root: Path) -> None:
    (root / "net/eth0").mkdir(parents=True)
    file = root / "net/eth0/a"
    file.write_text("1", encoding="ascii")
    settings = sysctl.Settings()
    settings.update({"net/eth0/a": "2"})
    file.write_text("1", encoding="ascii")

    settings.forget("eth0")
    settings.update({"net/eth0/a": "2"})

    assert file.read_text(encoding="ascii") == "2"


def test_a_parameter_that_the_guest_lacks_is_named(root: Path) -> None:
    assert sysctl.Settings().update({"net/none": "2"}) == ["net/none = 2: the guest's kernel has none"]
    assert list(root.iterdir()) == []
