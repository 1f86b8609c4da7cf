"""The management API's messages as JSON values; numbers stay numbers, unlike in protobuf's own form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message


def as_dict(message: Message) -> dict[str, Any]:
    """Return every field of a message by its name; an absent message is ``None``."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        is_message = field.message_type is not None
        if field.is_repeated:
            found[field.name] = [as_dict(each) for each in value] if is_message else list(value)
        elif is_message:
            found[field.name] = as_dict(value) if message.HasField(field.name) else None
        else:
            found[field.name] = value
    return found
