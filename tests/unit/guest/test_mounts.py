"""A storage that several containers use is mounted once, and unmounted with the last of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from guest.agent import storage
from guest.agent.mounts import Mounts
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT = "kept"


class Recorder:
    """Stands for the kernel: records what is mounted and unmounted."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing = ""
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def add(self, one: Any) -> Callable[[], None] | None:
        self.entered.set()
        assert self.go_on.wait(WITHIN_S)
        if one.mount_point == self.failing:
            raise OSError(f"{one.mount_point} fails")
        self.calls.append(f"+{one.mount_point}")
        return None if one.driver == KEPT else lambda: self.calls.append(f"-{one.mount_point}")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(storage, "add", recorder.add)
    return recorder


def at(mount_point: str, *, driver: str = "bind", shared: bool = False) -> Any:
    return SimpleNamespace(mount_point=mount_point, driver=driver, shared=shared)


def test_the_last_user_unmounts(kernel: Recorder) -> None:
    mounts = Mounts()
    first, second = mounts.hold([at("/a")]), mounts.hold([at("/a/")])
    mounts.release(first)
    assert kernel.calls == ["+/a"]
    mounts.release(second)
    assert kernel.calls == ["+/a", "-/a"]
    mounts.hold([at("/a")])
    assert kernel.calls == ["+/a", "-/a", "+/a"]


@pytest.mark.parametrize(
    "storage_kept", [at("/a", shared=True), at("/a", driver=KEPT)], ids=["shared", "pod's"]
)
def test_the_sandboxs_own_mounts_stay(kernel: Recorder, storage_kept: Any) -> None:
    mounts = Mounts()
    mounts.release(mounts.hold([storage_kept]))
    mounts.release(mounts.hold([storage_kept]))
    assert kernel.calls == ["+/a"]


def test_a_failure_undoes_the_earlier_steps(kernel: Recorder) -> None:
    kernel.failing = "/c"
    mounts = Mounts()
    with pytest.raises(OSError, match="/c fails"):
        mounts.hold([at("/a"), at("/b"), at("/c")])
    assert kernel.calls == ["+/a", "+/b", "-/b", "-/a"]
    kernel.failing = ""
    mounts.hold([at("/c")])
    assert kernel.calls[-1] == "+/c"


def test_waiting_for_a_disk_delays_only_its_other_users(kernel: Recorder) -> None:
    mounts = Mounts()
    kernel.go_on.clear()
    threads = [threading.Thread(target=mounts.hold, args=([at("/slow")],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert kernel.entered.wait(WITHIN_S)
    quick = threading.Thread(target=mounts.release, args=([],))
    quick.start()
    quick.join(WITHIN_S)
    assert not quick.is_alive()
    kernel.go_on.set()
    for thread in threads:
        thread.join(WITHIN_S)
    assert kernel.calls == ["+/slow"]


def test_the_end_of_the_machine_unmounts_everything_in_reverse(kernel: Recorder) -> None:
    mounts = Mounts()
    mounts.hold([at("/a", shared=True), at("/a/b")])
    mounts.release_all()
    assert kernel.calls == ["+/a", "+/a/b", "-/a/b", "-/a"]


def test_concurrent_users_never_mount_twice_or_lose_a_mount_in_use(kernel: Recorder) -> None:
    mounts, names = Mounts(), ["/a", "/b", "/c"]

    def live(seed: int) -> None:
        for number in range(200):
            name = names[(seed + number) % len(names)]
            held = mounts.hold([at(name)])
            assert [call for call in kernel.calls if call[1:] == name][-1] == f"+{name}"
            mounts.release(held)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(8)))
    for name in names:
        calls = [call[0] for call in kernel.calls if call[1:] == name]
        assert calls == ["+", "-"] * (len(calls) // 2)
