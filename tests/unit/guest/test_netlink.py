"""The kernel's routing messages, byte for byte as its headers define them (little-endian machine)."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Self, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.agent import addresses, netlink, network, rtnetlink
from guest.agent.errors import AgentError, InvalidArgument
from guest.agent.wire import Codec, Message
from guest.image import schema

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CODEC = Codec(schema.messages())
INDEXES = {"eth0": 2, "eth1": 3}
MAC = bytes.fromhex("020000000001")


def hexed(text: str) -> bytes:
    return bytes.fromhex(text.replace("|", " "))


# Each row of a header, then one attribute after another: length, type, value, padding.
LINK = hexed("00 00 0100 02000000 43100100 00000000 | 0900 0300 6574683000 000000 | 0800 0400 78050000")
LINK_WITH_MAC = LINK + hexed("0a00 0100 020000000001 0000")
ADDRESS_V4 = hexed("02 18 00 00 02000000 | 0800 0200 c0000202 | 0800 0100 c0000202 | 0800 0400 c00002ff")
ADDRESS_V6 = hexed(
    "0a 40 02 00 02000000 | 1400 0200 20010db8000000000000000000000002"
    "| 1400 0100 20010db8000000000000000000000002"
)
ROUTE = hexed(
    "02 10 00 00 fe 03 00 01 04000000 | 0800 0100 0a010000 | 0800 0600 07000000 | 0800 0700 c0000202"
    "| 0c00 0800 0800 0200 14050000 | 0800 0400 02000000 | 0800 0500 cb007101"
)
ROUTE_VIA = hexed(
    "02 00 00 00 fe 03 00 01 00000000 | 0800 0400 02000000"
    "| 1600 1200 0a00 fe800000000000000000000000000001 0000"
)
ROUTE_SHARED = hexed(
    "02 10 00 00 fe 03 00 01 00000000 | 0800 0100 0a030000"
    "| 2400 0900 1000 00 00 02000000 0800 0500 c0000203 1000 00 02 03000000 0800 0500 c0000204"
)
ROUTE_KEY = hexed("02 10 00 00 fe 03 ff 01 00000000 | 0800 0100 0a010000 | 0800 0600 07000000")
NEIGHBOUR = hexed("02 00 0000 02000000 8000 00 00 | 0800 0100 c0000209 | 0a00 0200 020000000001 0000")


def route(**fields: object) -> rtnetlink.KernelRoute:
    return network._route(CODEC.new("types.Route", **fields), INDEXES)


FULL = {
    "dest": "10.1.0.0/16",
    "gateway": "203.0.113.1",
    "device": "eth0",
    "flags": 4 | 1,  # of these flags, the host decides only "on link"
    "mtu": 1300,
    "metric": 7,
    "source": "192.0.2.2",
}


def test_messages_have_the_kernels_layout() -> None:
    pack = addresses.pack
    v4 = rtnetlink.LinkAddress(index=2, packed=pack("192.0.2.2"), prefix=24)
    v6 = rtnetlink.LinkAddress(index=2, packed=pack("2001:db8::2"), prefix=64, flags=rtnetlink.IFA_F_NODAD)
    hops = [
        CODEC.new("hako.NextHop", gateway="192.0.2.3", device="eth0", weight=1),
        CODEC.new("hako.NextHop", gateway="192.0.2.4", device="eth1", weight=3),
    ]
    assert rtnetlink.encode_link(2, name="eth0", mac=MAC, mtu=1400, flags=1, mask=0x81) == hexed(
        "00 00 0000 02000000 01000000 81000000"
        "| 0a00 0100 020000000001 0000 | 0800 0400 78050000 | 0900 0300 6574683000 000000"
    )
    assert rtnetlink.encode_address(v4) == ADDRESS_V4
    assert rtnetlink.encode_address(v6) == ADDRESS_V6
    assert rtnetlink.encode_route(route(**FULL)) == ROUTE
    assert rtnetlink.encode_route(route(gateway="fe80::1", device="eth0")) == ROUTE_VIA
    assert rtnetlink.encode_route(route(dest="10.3.0.0/16", next_hops=hops)) == ROUTE_SHARED
    assert rtnetlink.encode_route_key(route(**FULL)) == ROUTE_KEY
    assert rtnetlink.encode_neighbour(2, packed=pack("192.0.2.9"), mac=MAC, state=0x80, flags=0) == NEIGHBOUR


def test_links_and_addresses_are_decoded() -> None:
    link = rtnetlink.decode_link(LINK_WITH_MAC)
    assert (link.index, link.name, link.mac, link.mtu, link.flags) == (2, "eth0", MAC, 1400, 0x11043)
    assert rtnetlink.decode_link(LINK).mac == b""
    v4, v6 = rtnetlink.decode_address(ADDRESS_V4), rtnetlink.decode_address(ADDRESS_V6)
    assert (v4.index, addresses.text_of(v4.packed), v4.prefix) == (2, "192.0.2.2", 24)
    assert (addresses.text_of(v6.packed), v6.prefix, v6.flags) == ("2001:db8::2", 64, 2)
    # The long flags take precedence over the short ones of the header.
    assert rtnetlink.decode_address(ADDRESS_V6 + hexed("0800 0800 82000000")).flags == 0x82


@pytest.mark.parametrize("body", [ROUTE, ROUTE_VIA, ROUTE_SHARED])
def test_routes_are_decoded(body: bytes) -> None:
    assert rtnetlink.encode_route(rtnetlink.decode_route(body)) == body


def test_a_table_number_above_255_is_read_from_its_attribute() -> None:
    assert rtnetlink.decode_route(ROUTE + hexed("0800 0f00 e8030000")).table == 1000


@pytest.mark.parametrize(
    ("flags", "tail", "text"),
    [
        (0x100, "", "Network is unreachable"),
        (0x300, "0c00 0100 6261642067770000", "Network is unreachable: bad gw"),
        (0x300, "0800 0200 10000000", "Network is unreachable"),
    ],
)
def test_a_refusal_repeats_the_kernels_words(flags: int, tail: str, text: str) -> None:
    code = (-errno.ENETUNREACH).to_bytes(4, "little", signed=True)
    error = netlink.refusal(code + bytes(16) + hexed(tail), flags=flags)
    assert error is not None
    assert (error.errno, error.strerror) == (errno.ENETUNREACH, text)
    assert netlink.refusal(bytes(20), flags=flags) is None


def test_a_datagram_may_hold_several_messages() -> None:
    first = netlink.message(16, 2, b"\1\2\3", sequence=7)
    second = netlink.message(3, 0, b"", sequence=7)
    assert first[:16] == hexed("13000000 1000 0200 07000000 00000000")
    assert list(netlink.messages(first + b"\0" + second)) == [(16, 2, 7, b"\1\2\3"), (3, 0, 7, b"")]


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (netlink.attributes, "0900 0300 65746830"),
        (netlink.attributes, "0300 0300"),
        (netlink.attributes, "0800 01"),
        (lambda data: list(netlink.messages(data)), "20000000 1000 0000 00000000 00000000"),
        (lambda data: list(netlink.messages(data)), "0f000000 1000 0000 00000000 00000000"),
        (lambda data: list(netlink.messages(data)), "10000000"),
        (lambda data: netlink.refusal(data, flags=0), "0000"),
        (rtnetlink.decode_link, "00 00 0100"),
        (rtnetlink.decode_address, "02 18 00 00 02000000 | 0700 0100 c00002 00"),
        (rtnetlink.decode_address, "02 18 00 00 02000000"),
        (rtnetlink.decode_route, "02 00 00 00 fe 03 00 01 00000000 | 0600 0400 0200 0000"),
        (rtnetlink.decode_route, "02 00 00 00 fe 03 00 01 00000000 | 0c00 0900 0c00 00 00 02000000"),
        (rtnetlink.decode_route, "02 00 00 00 fe 03 00 01 00000000 | 0c00 0900 0400 00 00 02000000"),
    ],
)
def test_a_length_beyond_the_message_is_an_error(decode: Callable[[bytes], object], data: str) -> None:
    with pytest.raises(ValueError, match="bytes"):
        decode(hexed(data))


@given(st.binary(max_size=80), st.sampled_from([LINK_WITH_MAC, ADDRESS_V4, ROUTE, ROUTE_SHARED]), st.data())
def test_a_random_answer_is_at_worst_malformed(noise: bytes, valid: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(valid)))
    for decode in (rtnetlink.decode_link, rtnetlink.decode_address, rtnetlink.decode_route):
        for body in (noise, valid[:cut], valid[:cut] + noise):
            with contextlib.suppress(ValueError):
                decode(body)


class Kernel:
    """The other end of a channel; it has datagrams to receive."""

    def __init__(self, *datagrams: bytes) -> None:
        self.datagrams = list(datagrams)

    def send(self, request: bytes) -> None:
        assert len(request) >= 16

    def recv(self, _size: int) -> bytes:
        return self.datagrams.pop(0)


def channel_to(*datagrams: bytes) -> netlink.NetlinkChannel:
    channel = netlink.NetlinkChannel()
    channel._socket.close()
    channel._socket = cast("socket.socket", Kernel(*datagrams))
    return channel


def test_a_list_that_changes_during_the_dump_is_read_again() -> None:
    link, interrupted, done = (16, 2, LINK), (16, 0x12, LINK), (3, 2, bytes(4))
    datagrams = [
        b"".join(netlink.message(kind, flags, body, sequence=sequence) for kind, flags, body in parts)
        for sequence, parts in ((1, [link]), (1, [interrupted]), (1, [done]), (1, [link]), (2, [link, done]))
    ]
    found = channel_to(*datagrams).dump(18, rtnetlink.ALL_LINKS, decode=rtnetlink.decode_link)
    # The fourth is a late answer to the first request.
    assert [link.name for link in found] == ["eth0"]


def test_objects_of_another_address_family_are_left_out() -> None:
    answer = b"".join(
        netlink.message(kind, 2, body, sequence=1)
        for kind, body in ((20, ADDRESS_V4), (20, b"\7\0\0\0"), (3, bytes(4)))
    )
    found = channel_to(answer).dump(
        22, rtnetlink.all_addresses(socket.AF_INET), decode=rtnetlink.decode_address
    )
    assert len(found) == 1


@pytest.mark.parametrize("body", [LINK[:20], b"\0"])
def test_a_malformed_object_is_blamed_on_the_kernel(body: bytes) -> None:
    answer = netlink.message(16, 2, body, sequence=1) + bytes(-len(body) % 4)
    answer += netlink.message(3, 2, bytes(4), sequence=1)
    with pytest.raises(AgentError, match="netlink: malformed answer"):
        channel_to(answer).dump(18, rtnetlink.ALL_LINKS, decode=rtnetlink.decode_link)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"dest": "10.0.0.0/8", "family": 1, "device": "eth0"}, "mixes IPv4 and IPv6"),
        ({"source": "fe80::1", "device": "eth0"}, "mixes IPv4 and IPv6"),
        ({"family": 2, "device": "eth0"}, "family 2"),
        ({"source": "10.0.0.0/8", "device": "eth0"}, "not an address"),
        ({"family": 1, "gateway": "10.0.0.1", "device": "eth0"}, "IPv6 cannot go through IPv4"),
        ({"dest": "10.0.0.0/33", "device": "eth0"}, "not a prefix length"),
        ({"dest": "10.0.0.0/", "device": "eth0"}, "not a prefix length"),
        ({"dest": "10.0.0/8", "device": "eth0"}, "not an IP address"),
        ({"dest": "fe80::1%eth0", "family": 1, "device": "eth0"}, "not an IP address"),
        ({"gateway": "gateway\0", "device": "eth0"}, "not an IP address"),
    ],
)
def test_a_malformed_route_is_refused(fields: dict[str, object], cause: str) -> None:
    with pytest.raises(InvalidArgument, match=cause):
        route(**fields)


def test_a_route_to_a_missing_device_is_refused() -> None:
    with pytest.raises(AgentError, match="eth7: Link not found"):
        route(device="eth7")


@pytest.mark.parametrize(("dest", "family"), [("0.0.0.0/0", 0), ("::/0", 1), ("", 1)])
def test_the_default_route_has_no_destination(dest: str, family: int) -> None:
    made = route(dest=dest, family=family, device="eth0")
    assert (made.dest, made.prefix) == (b"", 0)


@pytest.mark.parametrize(
    "text", ["", "02:00", "02:00:00:00:00:0g", "02:00:00:00:00:01:02", "2:0:0:0:0:1", "0200:00"]
)
def test_a_malformed_hardware_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not a hardware address"):
        addresses.pack_mac(text)


def test_the_kernels_link_local_address_is_recognized() -> None:
    assert addresses.text_of(addresses.link_local(MAC)) == "fe80::ff:fe00:1"


class Recorder:
    """Records what a network changes in the kernel; lists two links."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, bytes]] = []
        self.refused: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def change(self, kind: int, body: bytes, **_flags: int) -> None:
        if body in self.refused:
            raise OSError(self.refused[body], "refused")
        self.changes.append((kind, body))

    def dump(self, kind: int, _body: bytes, **_decode: object) -> list[rtnetlink.Link]:
        if kind != rtnetlink.RTM_GETLINK:
            return []
        return [
            rtnetlink.Link(index=index, name=name, mac=MAC, mtu=1500, flags=0)
            for name, index in INDEXES.items()
        ]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(network, "NetlinkChannel", lambda: made)
    return made


def wanted(**fields: object) -> Message:
    return CODEC.new("types.Route", device="eth0", **fields)


def test_old_routes_go_first_and_routes_without_a_gateway_come_next(recorder: Recorder) -> None:
    routes = network.GuestNetwork(CODEC)
    old, near, far = wanted(dest="10.9.0.0/16"), wanted(dest="10.8.0.1/32"), wanted(gateway="10.8.0.1")
    add, delete = rtnetlink.RTM_NEWROUTE, rtnetlink.RTM_DELROUTE

    def encoded(one: Message) -> bytes:
        return rtnetlink.encode_route(network._route(one, INDEXES))

    routes.update_routes([far, near, old])
    assert recorder.changes == [(add, encoded(near)), (add, encoded(old)), (add, encoded(far))]
    key = rtnetlink.encode_route_key(network._route(old, INDEXES))
    # It went with its link, which is accepted.
    recorder.changes.clear()
    recorder.refused[key] = errno.ESRCH
    routes.update_routes([far, near])
    assert recorder.changes == [(add, encoded(near)), (add, encoded(far))]
    recorder.changes.clear()
    routes.update_routes([])
    assert [kind for kind, _body in recorder.changes] == [delete, delete]


def test_one_bad_route_prevents_all_changes(recorder: Recorder) -> None:
    with pytest.raises(InvalidArgument):
        network.GuestNetwork(CODEC).update_routes([wanted(dest="10.9.0.0/16"), wanted(dest="nonsense")])
    assert recorder.changes == []


@pytest.mark.parametrize(("disabled", "kept"), [("0\n", [ADDRESS_V4, ADDRESS_V6]), ("1\n", [ADDRESS_V4])])
def test_ipv6_is_left_out_if_the_guest_lacks_it(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: str, kept: list[bytes]
) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all/disable_ipv6").write_text(disabled)
    monkeypatch.setattr(network, "_IPV6_SETTINGS", str(tmp_path))
    monkeypatch.setattr(network.modules, "load", lambda _name: True)
    monkeypatch.setattr(network, "log", lambda _line: None)
    asked = [
        CODEC.new("types.IPAddress", address="192.0.2.2", mask="24"),
        CODEC.new("types.IPAddress", address="2001:db8::2", mask="64", family=1),
    ]
    interface = CODEC.new("types.Interface", name="eth0", hwAddr=MAC.hex(":"), mtu=1500, IPAddresses=asked)
    network.GuestNetwork(CODEC).update_interface(interface)
    assert [body for kind, body in recorder.changes if kind == rtnetlink.RTM_NEWADDR] == kept
