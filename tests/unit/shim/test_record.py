"""Records behave like dataclasses, at a lower cost."""

from __future__ import annotations

import pytest

from shim.record import Record


class Point(Record):
    x: int
    y: int = 2


def test_fields_are_given_by_name_or_have_a_default() -> None:
    assert Point(x=1).as_dict() == {"x": 1, "y": 2}
    assert repr(Point(x=1, y=3)) == "Point(x=1, y=3)"


def test_equal_fields_make_equal_records() -> None:
    assert Point(x=1) == Point(x=1, y=2)
    assert Point(x=1) != Point(x=2)
    assert len({Point(x=1), Point(x=1, y=2)}) == 1


def test_records_of_different_classes_differ() -> None:
    class Other(Record):
        x: int
        y: int = 2

    assert Point(x=1) != Other(x=1)


@pytest.mark.parametrize(("values", "message"), [({}, "Point needs x"), ({"x": 1, "z": 1}, "Point has no z")])
def test_missing_and_unknown_fields_are_errors(values: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Point(**values)


def test_a_field_cannot_be_set() -> None:
    point = Point(x=1)
    with pytest.raises(AttributeError, match="Point is frozen: x cannot be set"):
        point.x = 2  # type: ignore[misc]  # the error under test
