"""The guest agent: process 1 of the virtual machine, serving Kata's agent protocol over ttrpc.

It starts under software emulation, where every imported module costs milliseconds: it uses no asyncio, no
enum, no dataclass and no regular expression, and it uses ``_socket`` and ``_thread`` without their wrappers.
"""
