"""A network card uses the right number of queue pairs; a stand-in for its driver answers the ioctl."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

import pytest

from guest.agent import channels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any


GET, SET = 0x3C, 0x3D


class Driver:
    """Cards by name: their greatest number of queue pairs, and the number in use."""

    def __init__(self, **cards: tuple[int, int] | None) -> None:
        self.cards = cards
        self.commands: list[Any] = []

    def ioctl(self, _fd: int, _code: int, request: bytes) -> None:
        name, pointer = struct.unpack("@16sP16x", request)
        name = name.rstrip(b"\0").decode()
        words = (ctypes.c_uint32 * 9).from_address(pointer)
        self.commands.append((name, words[0]))
        if self.cards[name] is None:
            raise OSError(95, "Operation not supported")
        if words[0] == GET:
            channels = self.cards[name]
            assert channels is not None
            words[4], words[8] = channels
        else:
            self.cards[name] = (words[4], words[8])


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    def use(processors: int, **cards: tuple[int, int] | None) -> Driver:
        driver = Driver(**cards)
        for name in cards:
            (tmp_path / name / "device").mkdir(parents=True)
            (tmp_path / name / "device/driver").symlink_to("../../../../bus/virtio/drivers/virtio_net")
        (tmp_path / "lo").mkdir()
        monkeypatch.setattr(channels, "_NET", str(tmp_path))
        monkeypatch.setattr(channels.fcntl, "ioctl", driver.ioctl)
        channels.use(processors)
        return driver

    return use


@pytest.mark.parametrize(
    ("processors", "before", "after"), [(2, (4, 1), (4, 2)), (8, (4, 1), (4, 4)), (1, (4, 3), (4, 1))]
)
def test_a_card_uses_as_many_pairs_as_it_can_up_to_one_per_processor(
    drive: Callable[..., Driver], processors: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    assert drive(processors, eth0=before).cards == {"eth0": after}


def test_a_card_with_the_right_number_of_pairs_is_left_alone(drive: Callable[..., Driver]) -> None:
    assert drive(2, eth0=(4, 2), eth1=(1, 1)).commands.count(("eth0", SET)) == 0


def test_a_card_that_refuses_does_not_affect_others(drive: Callable[..., Driver]) -> None:
    assert drive(2, eth0=None, eth1=(2, 1)).cards["eth1"] == (2, 2)
