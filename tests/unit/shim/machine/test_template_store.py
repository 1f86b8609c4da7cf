"""Templates appear on disk whole or not at all; there are few of them, and one user owns them."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from hypervisor import ChannelError, GuestLateError, TemplateError, TemplateLateError
from shim.errors import DeadlineExceeded
from shim.host.ledger import Ledger
from shim.machine import template_store
from shim.machine.cloning import blames_template
from shim.machine.template_store import KEPT, TemplateStore
from shim.refusal import Refusal
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from hypervisor import errors


KEY, OTHER = "a" * 32, "b" * 32
PURPOSE = {"kernel": "/k", "vcpus": 1}


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "run" / "templates")


def publish(
    store: TemplateStore, key: str, *, purpose: dict[str, Any] = PURPOSE, content: str = "memory"
) -> template_store.Template:
    with store.building(wait_s=0) as building:
        built = building.place / "template"
        built.mkdir()
        (built / "memory").write_text(content)
        return store.publish(key, built, purpose=purpose)


def keys(store: TemplateStore) -> list[str]:
    return [entry.key for entry in store.entries() if not entry.failure]


def test_a_published_template_is_found_by_its_key_only(store: TemplateStore) -> None:
    assert store.find(KEY) is None
    template = publish(store, KEY)

    assert store.find(KEY) == template
    assert (template.path / "memory").read_text() == "memory"
    assert store.find(OTHER) is None


def test_other_users_cannot_read_the_store(store: TemplateStore) -> None:
    publish(store, KEY)
    for place in (store.directory, store.directory.parent):
        assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o770), lambda path: os.chown(path, 1, 1)])
def test_a_store_that_others_can_write_to_is_not_trusted(
    store: TemplateStore, spoil: Callable[..., Any]
) -> None:
    publish(store, KEY)
    spoil(store.directory)

    with pytest.raises(Refusal, match="no other can write to; correct that"):
        store.find(KEY)
    with pytest.raises(Refusal), store.building(wait_s=0):
        pass


def test_a_link_is_not_accepted_as_the_store(store: TemplateStore, tmp_path: Path) -> None:
    publish(store, KEY)
    link = TemplateStore(tmp_path / "link")
    link.directory.symlink_to(store.directory)

    with pytest.raises(Refusal):
        link.find(KEY)


def test_a_build_that_fails_leaves_nothing(store: TemplateStore) -> None:
    def build() -> None:
        with store.building(wait_s=0) as building:
            (building.place / "memory").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()

    assert [path.name for path in store.directory.iterdir()] == ["lock"]


def test_the_next_build_removes_leftovers_of_a_killed_build(store: TemplateStore) -> None:
    publish(store, KEY)
    for name in (".building", ".removed-1-1"):
        (store.directory / name).mkdir()
        (store.directory / name / "memory").touch()

    with store.building(wait_s=0) as building:
        assert list(building.place.iterdir()) == []
    assert sorted(path.name for path in store.directory.iterdir()) == [KEY, "lock"]


def test_only_one_process_builds_at_a_time(store: TemplateStore) -> None:
    assert not store.is_building()
    with store.building(wait_s=0):
        assert store.is_building()
        with pytest.raises(Refusal, match="another is being built"), store.building(wait_s=0):
            pass
    assert not store.is_building()


def test_a_waiting_builder_builds_after_the_other(store: TemplateStore) -> None:
    order = []

    def second() -> None:
        with store.building(wait_s=WITHIN_S):
            order.append("second")

    with store.building(wait_s=0):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(WITHIN_S)
    assert order == ["first", "second"]


def test_a_builder_that_hangs_is_waited_for_only_so_long(store: TemplateStore) -> None:
    with (
        store.building(wait_s=0),
        pytest.raises(Refusal, match=r"lock: another build has held it for 0\.02 s; find it"),
        store.building(wait_s=0.02),
    ):
        pass


def test_what_a_killed_builder_has_made_on_the_host_is_undone(store: TemplateStore, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    left = store.directory / ".building"
    left.mkdir(parents=True)
    ledger = Ledger(str(left), create=True)
    ledger.directory(str(made))
    ledger.close()
    with store.building(wait_s=0) as building:
        assert not made.exists()
        assert list(building.place.iterdir()) == []


def test_a_new_template_for_the_same_purpose_replaces_the_old_one(store: TemplateStore) -> None:
    publish(store, KEY)
    publish(store, OTHER)
    assert keys(store) == [OTHER]


def test_if_there_are_too_many_the_least_recently_used_templates_go(
    store: TemplateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = range(KEPT + 2)
    for number in numbers:
        template = publish(store, f"{number:032}", purpose={"vcpus": number})
        os.utime(template.path, (number, number))
        if number == KEPT - 1:
            store.find(f"{0:032}")

    assert sorted(keys(store)) == [f"{number:032}" for number in (0, *numbers[-KEPT + 1 :])]


def test_a_useless_template_is_discarded_without_its_replacement(store: TemplateStore) -> None:
    broken = publish(store, KEY)
    store.discard(broken, reason="truncated")
    assert store.find(KEY) is None

    better = publish(store, KEY)
    store.discard(broken, reason="truncated")
    assert store.find(KEY) == better
    assert store.failure(KEY) == ""


def test_a_second_useless_template_on_the_same_day_is_a_failure(store: TemplateStore) -> None:
    for _ in range(2):
        store.discard(publish(store, KEY), reason="QEMU refuses")
    assert store.failure(KEY) == "QEMU refuses"


@pytest.mark.parametrize(("discards", "held_s"), [(2, 600), (3, 3600), (4, 21_600), (5, 86_400), (9, 86_400)])
def test_each_further_useless_template_in_a_day_delays_building_longer(
    store: TemplateStore, discards: int, held_s: int
) -> None:
    for _ in range(discards):
        store.discard(publish(store, KEY), reason="QEMU refuses")
    failure = store.directory / f"{KEY}.failed"
    for age_s, said in ((held_s - 60, "QEMU refuses"), (held_s + 60, "")):
        os.utime(failure, times=(time.time() - age_s,) * 2)
        assert store.failure(KEY) == said


def test_a_clone_that_answers_resets_the_count_of_useless_templates(store: TemplateStore) -> None:
    store.discard(publish(store, KEY), reason="QEMU refuses")
    template = publish(store, KEY)
    store.answers(template)
    store.discard(template, reason="QEMU refuses")
    assert store.failure(KEY) == ""


def test_three_late_clones_in_a_row_make_a_template_useless(store: TemplateStore) -> None:
    template = publish(store, KEY)
    assert [store.is_late(template) for _ in range(3)] == [False, False, True]
    store.answers(template)
    assert not store.is_late(template)


def test_the_count_of_late_clones_is_not_listed_as_a_template(store: TemplateStore) -> None:
    template = publish(store, KEY)
    store.is_late(template)
    store.discard(publish(store, OTHER, purpose={}), reason="QEMU refuses")
    assert keys(store) == [KEY]
    assert store.remove("") == [KEY]


def test_a_failure_counts_for_a_while_or_until_a_build_succeeds(
    store: TemplateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, OTHER)
    assert store.failure(KEY) == ""
    store.fail(KEY, "no memory")
    assert store.failure(KEY) == "no memory"
    assert {entry.key: entry.failure for entry in store.entries()} == {KEY: "no memory", OTHER: ""}

    publish(store, KEY)
    assert store.failure(KEY) == ""
    store.fail(KEY, "no memory")
    monkeypatch.setattr(template_store, "RETRY_S", 0.0)
    assert store.failure(KEY) == ""


def test_the_list_shows_each_templates_purpose_and_size(store: TemplateStore) -> None:
    assert store.entries() == []
    template = publish(store, KEY, content="x" * 100_000)
    with (template.path / "memory").open("r+b") as file:
        file.truncate(1 << 30)

    [entry] = store.entries()

    assert (entry.key, entry.purpose, entry.failure) == (KEY, PURPOSE, "")
    assert 100_000 <= entry.size_bytes < 1 << 20
    assert entry.built_at == pytest.approx(entry.used_at, abs=5)


def test_templates_are_removed_by_a_prefix_of_their_key(store: TemplateStore) -> None:
    for key in (KEY, OTHER, f"ab{'0' * 30}"):
        publish(store, key, purpose={"key": key})
    with pytest.raises(Refusal, match="2 keys begin with it"):
        store.remove("a")
    with pytest.raises(Refusal, match="there is none"):
        store.remove("c")

    assert store.remove("aa") == [KEY]
    assert store.remove("") == [f"ab{'0' * 30}", OTHER]
    assert store.entries() == []
    assert store.remove("") == []


def test_an_emptied_template_is_not_listed(store: TemplateStore) -> None:
    template = publish(store, KEY)
    for file in template.path.iterdir():
        file.unlink()
    assert store.entries() == []
    assert store.remove(KEY) == [KEY]


@pytest.mark.parametrize(
    "late", [TemplateLateError("late"), GuestLateError("silent"), DeadlineExceeded("late")]
)
def test_a_late_clone_is_blamed_on_its_template_unless_qemu_was_starved(
    late: errors.GuestLateError | errors.TemplateLateError | DeadlineExceeded,
) -> None:
    assert blames_template(late, starved=False)
    assert not blames_template(late, starved=True)


@pytest.mark.parametrize("error", [TemplateError("refused"), ChannelError("guest reset")])
def test_refusals_and_dead_guests_are_always_blamed_on_the_template(
    error: errors.ChannelError | errors.TemplateError,
) -> None:
    assert blames_template(error, starved=True)
