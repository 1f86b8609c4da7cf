"""``@override``, as :mod:`hypervisor.override` has it, without the import of that package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import override as override  # noqa: PLC0414 - re-exported
else:

    def override(method: Any) -> Any:
        """Return a method unchanged."""
        return method
