"""The request that each release of containerd sends to ``start``, and the reply that it understands."""

from __future__ import annotations

import json
import os

from shim.bootstrap import grouping, wire
from shim.bootstrap.wire import BootstrapParams, RuntimeOptions
from shim.record import Record
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.bootstrap.command_line import CommandLine
    from shim.host.state_directory import StartRecord

#: Longest input, in bytes.
MAX_INPUT = 10 << 20


class Caller(Record):
    """The containerd that runs ``start``, and its request."""

    #: ``1.6``, ``1.7`` (1.7 to 2.2) or ``2.3`` (and later).
    dialect: str
    params: BootstrapParams


def identify_caller(data: bytes, line: CommandLine) -> Caller:
    """Tell containerd's dialects apart by standard input and environment.

    :param data: the whole standard input.
    :param line: the flags.
    :returns: the dialect, and the request as in the newest dialect.
    :raises Refusal: if the input is not a known message.
    """
    dialect = "1.7" if "MAX_SHIM_VERSION" in os.environ else "1.6"
    try:
        params = wire.decode_params(data)
        if data and params.instance_id == line.id and params.namespace == line.namespace:
            _check_paths(params)
            return Caller(dialect="2.3", params=params)
        options = wire.decode_options(data) or RuntimeOptions()
    except wire.NotProtobufError as error:
        raise Refusal(
            f"start: standard input: neither runtime options nor bootstrap parameters: {error}; "
            "use containerd 1.6 or later"
        ) from error
    environment = os.environ
    return Caller(
        dialect=dialect,
        params=BootstrapParams(
            ttrpc_address=environment.get("TTRPC_ADDRESS") or f"{line.address}.ttrpc",
            grpc_address=environment.get("GRPC_ADDRESS") or line.address,
            binary=line.publish_binary,
            options=options,
        ),
    )


def _check_paths(params: BootstrapParams) -> None:
    for path in (params.ttrpc_address, params.grpc_address, params.binary, params.socket_dir):
        if "\0" in path:
            raise Refusal(f"start: standard input: {path!r}: holds a NUL byte; use containerd's own")


def version_for(caller: Caller, bundle: str, publish_binary: str) -> int:
    """Choose the version of the shim protocol: with 3, containerd adds containers without a ``start``."""
    if caller.dialect == "1.6" or not grouping.is_pod(bundle):
        return 2
    if caller.dialect == "2.3":
        return 3
    from shim.bootstrap import containerd_version  # noqa: PLC0415 - few need it

    try:
        major = containerd_version.find(publish_binary).partition(".")[0]
    except Refusal:
        return 2  # every containerd accepts it
    return 3 if major.isdigit() and int(major) > 1 else 2


def check_grpc(caller: Caller, publish_binary: str) -> None:
    """Refuse gRPC if containerd cannot use it: only 1.7 can, and only its version tells."""
    version = "1.6" if caller.dialect == "1.6" else "2.3 or later"
    if caller.dialect == "1.7":
        from shim.bootstrap import containerd_version  # noqa: PLC0415 - few need it

        version = containerd_version.find(publish_binary)
        if version.startswith("1.7."):
            return
    raise Refusal(
        f'start: config shim.protocol: containerd {version} cannot drive a shim over grpc; set it to "ttrpc"'
    )


def bare(address: str) -> str:
    """Return the path of a socket's address."""
    return address.removeprefix("unix://")


def reply_of(record: StartRecord, *, dialect: str) -> tuple[str, bytes]:
    """Format the address of a shim.

    :param record: how it was started.
    :param dialect: of the caller; see :class:`Caller`.
    :returns: the address for the bundle, and the answer to the caller.
    """
    if record.protocol == "grpc":
        # containerd 1.7 dials a gRPC address without a scheme, and reads the file like the reply.
        text = _json(record, record.socket_path)
        address, reply = text, text.encode()
    else:
        address = f"unix://{record.socket_path}"
        if dialect == "2.3":
            reply = wire.encode_result(version=record.version, address=address, protocol=record.protocol)
        elif dialect == "1.7":
            reply = _json(record, address).encode()
        else:
            reply = address.encode()
    return address, reply


def _json(record: StartRecord, address: str) -> str:
    return json.dumps({"version": record.version, "address": address, "protocol": record.protocol})
