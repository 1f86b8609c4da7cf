"""FIFOs carry every byte, in any order of opening and closing their ends."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from shim.errors import DeadlineExceeded, InvalidArgument
from shim.sandbox import host_streams, log_driver
from shim.sandbox.host_streams import HostStreams, Stdio, read_chunk, write_all
from tests.descriptors import descriptors
from tests.waiting import WITHIN_S, settle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "stream"
    os.mkfifo(path)
    return path


async def open_host_streams(streams: Stdio) -> HostStreams:
    return await host_streams.open_host_streams(streams, container_id="box", namespace="test")


async def read_to_end(descriptor: int) -> bytes:
    data = b""
    while chunk := await read_chunk(descriptor):
        data += chunk
    return data


async def test_output_written_before_the_reader_reads_is_not_lost(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    streams = await open_host_streams(Stdio(stdout=str(fifo)))
    await write_all(streams.stdout, b"short-lived")
    streams.close("stdout")
    assert await read_to_end(reader) == b"short-lived"
    os.close(reader)


async def test_opening_waits_for_a_reader_that_comes_late(fifo: Path) -> None:
    opening = asyncio.create_task(open_host_streams(Stdio(stdout=str(fifo))))
    await settle()
    assert not opening.done()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    streams = await opening
    await write_all(streams.stdout, b"late")
    streams.close_all()
    assert await read_to_end(reader) == b"late"
    os.close(reader)


async def test_a_missing_reader_is_an_error_and_leaves_no_descriptor_open(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_streams, "OPEN_TIMEOUT_S", 0.1)
    await asyncio.to_thread(os.getpid)  # from here on the loop's own descriptors exist
    before = descriptors()
    with pytest.raises(DeadlineExceeded, match="no reader within"):
        await open_host_streams(Stdio(stdout=str(fifo)))
    assert descriptors() <= before


async def test_a_reader_may_leave_and_another_may_come(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    streams = await open_host_streams(Stdio(stdout=str(fifo)))
    os.close(reader)
    await write_all(streams.stdout, b"kept")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    streams.close_all()
    assert await read_to_end(reader) == b"kept"
    os.close(reader)


async def test_output_larger_than_the_pipe_waits_for_the_reader(fifo: Path) -> None:
    data = os.urandom(1 << 20)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    streams = await open_host_streams(Stdio(stdout=str(fifo)))

    async def write() -> None:
        await write_all(streams.stdout, data)
        streams.close_all()

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        received = group.create_task(read_to_end(reader))
    assert received.result() == data
    os.close(reader)


async def test_stdin_ends_only_after_shim_and_client_close_it(fifo: Path) -> None:
    streams = await open_host_streams(Stdio(stdin=str(fifo)))
    streams.open_stdin(str(fifo))
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, b"first")
    os.close(writer)
    assert await read_chunk(streams.stdin) == b"first"
    second = asyncio.create_task(read_chunk(streams.stdin))
    await settle()
    assert not second.done()
    streams.close_stdin_writer()
    assert await second == b""
    streams.close_all()


async def test_input_closed_before_the_start_ends_with_its_client(fifo: Path) -> None:
    streams = await open_host_streams(Stdio(stdin=str(fifo)))
    streams.close_stdin_writer()
    client = asyncio.create_task(asyncio.to_thread(fifo.write_bytes, b"early"))
    await settle()
    streams.open_stdin(str(fifo))
    await client
    assert await read_to_end(streams.stdin) == b"early"
    streams.close_all()


async def test_with_a_terminal_the_stderr_path_is_never_opened(fifo: Path, tmp_path: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    streams = await open_host_streams(
        Stdio(stdout=str(fifo), stderr=str(tmp_path / "never made"), terminal=True)
    )
    assert streams.stderr == -1
    streams.close_all()
    os.close(reader)


async def test_a_missing_fifo_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nowhere: No such file"):
        await open_host_streams(Stdio(stdout=str(tmp_path / "nowhere")))


async def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'carrier-pigeon' is not supported"):
        await open_host_streams(Stdio(stdout="carrier-pigeon://coop"))


async def test_without_streams_nothing_is_opened() -> None:
    streams = await open_host_streams(Stdio())
    assert (streams.stdin, streams.stdout, streams.stderr) == (-1, -1, -1)


async def test_a_file_uri_appends_both_outputs_to_one_file(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/new/box%201.log"
    streams = await open_host_streams(Stdio(stdout=uri, stderr=uri))
    await write_all(streams.stdout, b"out\n")
    await write_all(streams.stderr, b"err\n")
    streams.close_all()
    assert (tmp_path / "new" / "box 1.log").read_bytes() == b"out\nerr\n"


DRIVER = """#!/bin/sh
echo "$CONTAINER_NAMESPACE/$CONTAINER_ID $*" >"{log}"
env | grep -cv -e ^CONTAINER_ -e ^PWD= -e ^SHLVL= -e ^_= >>"{log}"
{ready}
cat <&3 >>"{log}"
cat <&4 >>"{log}"
"""


def driver(tmp_path: Path, *, ready: str) -> str:
    program = tmp_path / "driver"
    program.write_text(DRIVER.format(log=tmp_path / "log", ready=ready))
    program.chmod(0o755)
    return f"{program}?first=1&second=2&first=ignored"


@pytest.mark.parametrize("scheme", ["binary", "binary-v2"])
async def test_a_log_driver_reads_both_outputs(tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}://{driver(tmp_path, ready='echo >&5')}"
    streams = await open_host_streams(Stdio(stdout=uri, stderr=uri))
    await write_all(streams.stdout, b"out\n")
    await write_all(streams.stderr, b"err\n")
    pidfd = os.pidfd_open(streams.driver._pid) if streams.driver else -1
    streams.close_all()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    async with asyncio.timeout(WITHIN_S):
        await ended.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)
    await streams.finish()
    assert (tmp_path / "log").read_text() == "test/box first 1 second 2\n0\nout\nerr\n"


async def test_a_log_driver_that_ends_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    uri = f"binary-v2://{driver(tmp_path, ready='exit 1')}"
    with pytest.raises(InvalidArgument, match="gave up before it was ready"):
        await open_host_streams(Stdio(stdout=uri, stderr=uri))


async def test_a_log_driver_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nobody: No such file"):
        await open_host_streams(Stdio(stdout=f"binary://{tmp_path}/nobody"))


async def test_a_log_driver_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_driver, "TERM_TIMEOUT_S", 0.1)
    stubborn = "trap '' TERM; echo >&5; exec sleep 60"
    streams = await open_host_streams(Stdio(stdout=f"binary://{driver(tmp_path, ready=stubborn)}"))
    process = streams.driver
    assert process is not None
    streams.close_all()
    await streams.finish()
    async with asyncio.timeout(WITHIN_S):
        await process._exited.wait()
