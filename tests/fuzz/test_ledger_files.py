"""A ledger that is torn or corrupted anywhere can still be read, appended to and undone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shim.bootstrap import delete
from shim.bootstrap.command_line import CommandLine
from shim.host.ledger import Ledger
from shim.refusal import Refusal
from tests.fuzz.material import bent, json_values
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from typing import Any


CASES = settings().max_examples


def lines_of(directory: Any) -> Any:
    """Write a ledger as a sandbox does; the things that it names do not exist."""
    return "".join(
        json.dumps(line) + "\n"
        for line in (
            {"number": 1, "kind": "file", "name": f"{directory}/socket", "pid": 0, "start_time": 0},
            {"number": 2, "kind": "process", "name": "qemu", "pid": 4194303, "start_time": 1},
            {"created": "box"},
            {"number": 3, "kind": "cgroup", "name": f"{directory}/share", "pid": 0, "start_time": 0},
            {"number": 4, "kind": "directory", "name": f"{directory}/share", "pid": 0, "start_time": 0},
            {"undone": 3},
            {"deleted": "box"},
        )
    ).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Path(os.path.realpath(tmp_path_factory.mktemp("ledger")))


@st.composite
def entries(draw: Any) -> Any:
    """Lines with the right keys and any values."""
    line = {"number": draw(json_values), "kind": draw(st.sampled_from(["file", "cgroup", "process", "x", 1]))}
    # Never a string: delete removes what a well-formed line names.
    line["name"] = draw(json_values.filter(lambda value: not isinstance(value, str)))
    line |= {"pid": draw(json_values), "start_time": draw(json_values)}
    for key in draw(st.lists(st.sampled_from(sorted(line)), max_size=2, unique=True)):
        del line[key]
    return json.dumps(line)


statements = st.builds(
    lambda key, value: json.dumps({key: value}),
    st.sampled_from(["undone", "created", "deleted"]),
    json_values,
)
texts = st.lists(st.one_of(entries(), statements, json_values.map(json.dumps)), max_size=6).map(
    lambda lines: "\n".join(lines).encode()
)


@settings(max_examples=3 * CASES)
@given(data=st.one_of(st.binary(max_size=60), texts), torn=st.integers(0, 500))
@example(data=b"5", torn=500)
@example(data=b"null\n[]", torn=500)
@example(data=b'{"kind": "file"}', torn=500)
@example(data=b'{"undone": []}', torn=500)
@example(data=b'{"created": {}}\n{"deleted": []}', torn=500)
@example(data=b'{"number": "x", "kind": "file", "name": "/", "pid": 0, "start_time": 0}', torn=500)
@example(data=b'{"number": 1, "kind": "file", "name": "/a\\u0000b", "pid": 0, "start_time": 0}', torn=500)
@example(data=b'{"number": 1, "kind": "file", "name": "relative", "pid": 0, "start_time": 0}', torn=500)
@example(data=b'{"number":1,"kind":"process","name":"x","pid":99999999999,"start_time":0}', torn=500)
@example(data=b'{"number":1,"kind":"process","name":"x","pid":-1,"start_time":0}', torn=500)
@example(data=b'{"number": 1, "kind": "file", "name": "/x", "pid": 0, "start_time": 0, "more": 1}', torn=500)
@example(data=b"[" * 5000, torn=500)
def test_a_corrupted_ledger_is_read_and_undone(place: Any, data: Any, torn: Any) -> None:
    directory = place / "state"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "ledger").write_bytes(lines_of(directory)[:torn] + data)
    ledger = Ledger(str(directory))
    number = ledger.file(str(directory / "new"))
    (directory / "new").touch()
    ledger.created("other")
    # Lines that are appended after the damage are whole.
    assert number in {entry.number for entry in ledger.entries()}
    assert "other" in ledger.containers()
    assert ledger.undo_all(deadline_s=WITHIN_S) == []
    ledger.close()
    assert not directory.exists()


@settings(max_examples=CASES)
@given(data=st.data())
def test_delete_ends_with_any_corrupted_ledger(place: Any, data: Any) -> None:
    directory = place / "state"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    content = data.draw(bent(st.just(lines_of(directory))))
    # The corrupted text must not name anything else on this machine.
    named = {word for word in content.replace(b"\\", b'"').split(b'"') if b"/" in word}
    if not all(word.startswith(f"{directory}/".encode()) and b".." not in word for word in named):
        return
    (directory / "ledger").write_bytes(content)
    bundle = place / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "hako").unlink(missing_ok=True)
    (bundle / "hako").symlink_to(directory)
    try:
        delete.delete(CommandLine(namespace="default", id="box", bundle=str(bundle)))
    except Refusal as refusal:
        assert str(refusal).startswith("delete: ")  # noqa: PT017 - a refusal must name what is left
        return
    assert not directory.exists()
