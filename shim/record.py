"""Immutable records for the start path, where importing ``dataclasses`` would cost 10 ms."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import dataclass_transform
else:

    def dataclass_transform(**_):  # noqa: ANN003, ANN201 - type checkers see the real one
        """Stand in for ``typing.dataclass_transform``, which only type checkers need."""
        return lambda base: base


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """A frozen, keyword-only record: each annotation of a subclass is a field with its default."""

    def __init__(self, **values: object) -> None:
        for name in self.fields():
            if name in values:
                object.__setattr__(self, name, values.pop(name))
            elif not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} needs {name}")
        if values:
            raise TypeError(f"{type(self).__name__} has no {next(iter(values))}")

    @classmethod
    def fields(cls) -> list[str]:
        """Name the fields in the order of their declaration."""
        return list(cls.__annotations__)

    def as_dict(self) -> dict[str, object]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in self.fields()}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Record) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({fields})"
