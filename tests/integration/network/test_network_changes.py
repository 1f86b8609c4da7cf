"""The machine follows changes of its namespace on a real kernel."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from shim.errors import Internal
from tests.network_space import Space, add_cable
from tests.patience import patient

from .machine import Machine, attach, network_of

if TYPE_CHECKING:
    from shim.host.ledger import Ledger

DEADLINE_S = patient(60.0)


async def test_an_interface_that_comes_late_becomes_a_card_at_the_next_scan(
    empty_pod: Space, outside: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(empty_pod, ledger) as network:
        await attach(network, machine)
        add_cable(empty_pod, outside, "eth0", number=1)
        empty_pod.ip("route add default via 10.1.0.1")
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert machine.names() == ["eth0"]
        assert [each.gateway for each in machine.told[-1].Routes] == ["10.1.0.1"]

        add_cable(empty_pod, outside, "net1", number=2)
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert machine.names() == ["eth0", "net1"]


async def test_a_change_after_a_scan_is_noticed(
    pod: Space, outside: Space, ledger: Ledger, machine: Machine
) -> None:
    changes = {
        "interface": lambda: add_cable(pod, outside, "net1", number=2),
        "address": lambda: pod.ip("addr add 10.1.0.9/32 dev eth0"),
        "route": lambda: pod.ip("route add 10.9.0.0/16 via 10.1.0.1"),
        "rule": lambda: pod.ip("rule add to 10.9.0.0/16 prohibit"),
        "neighbour": lambda: pod.ip("neigh add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent"),
        "parameter": lambda: pod.set("net/ipv4/conf/eth0/forwarding", "1"),
        "end": lambda: pod.ip("link delete net1"),
    }
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        await network.rescan(vm=machine.vm, agent=machine.agent)
        for what, change in changes.items():
            noticed = asyncio.create_task(network.changed())
            await asyncio.sleep(0)
            told = len(machine.told)
            await asyncio.to_thread(change)
            async with asyncio.timeout(DEADLINE_S):
                await noticed
            await network.rescan(vm=machine.vm, agent=machine.agent)
            assert len(machine.told) > told, what


async def test_an_interface_that_is_gone_is_unplugged(
    pod: Space, outside: Space, ledger: Ledger, machine: Machine
) -> None:
    add_cable(pod, outside, "net1", number=2)
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        pod.ip("link delete net1")
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert [card.mac for card in machine.cards.values()] == [machine.told[0].hwAddr]


async def test_an_interface_that_goes_down_is_given_back(
    pod: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        pod.ip("link set eth0 down")
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert machine.cards == {}
        assert "ingress" not in pod.run("tc", "qdisc")


async def test_a_new_address_reaches_the_guest_at_the_next_scan(
    pod: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        told = len(machine.told)
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert len(machine.told) == told

        pod.ip("addr add 10.1.0.9/32 dev eth0")
        await network.rescan(vm=machine.vm, agent=machine.agent)
        interface, _ = machine.told[told:]
        assert "10.1.0.9" in {each.address for each in interface.IPAddresses}
        assert len(machine.cards) == 1


async def test_a_scan_that_failed_is_made_good_by_the_next(
    pod: Space, outside: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        add_cable(pod, outside, "net1", number=2)
        machine.refuses = "plug"
        with pytest.raises(Internal):
            await network.rescan(vm=machine.vm, agent=machine.agent)
        assert len(machine.cards) == 1
        machine.refuses = ""
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert len(machine.cards) == 2
        assert machine.names()[-1] == "net1"


async def test_the_guest_gets_rules_and_parameters_once_and_when_they_change(
    pod: Space, ledger: Ledger, machine: Machine
) -> None:
    machine.is_hako = True
    pod.ip("rule add to 10.9.0.0/16 prohibit")
    pod.set("net/core/somaxconn", "99")
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        [request] = machine.requests
        assert "rule 32765: from all to 10.9.0.0/16 prohibit" in {rule.text for rule in request.rules.rules}
        assert request.settings.values["net/core/somaxconn"] == "99"

        pod.ip("route add blackhole 10.9.0.0/16")
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert not machine.requests[-1].HasField("rules")
        assert not machine.requests[-1].HasField("settings")

        pod.ip("rule del to 10.9.0.0/16 prohibit")
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert len(machine.requests[-1].rules.rules) == 5


async def test_the_guest_gets_parameters_again_for_a_new_card(
    pod: Space, outside: Space, ledger: Ledger, machine: Machine
) -> None:
    machine.is_hako = True
    pod.set("net/ipv4/conf/eth0/rp_filter", "1")
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        add_cable(pod, outside, "net1", number=2)
        await network.rescan(vm=machine.vm, agent=machine.agent)
        assert machine.requests[-1].settings.values["net/ipv4/conf/eth0/rp_filter"] == "1"


async def test_a_packet_filter_that_comes_later_is_named(
    pod: Space, ledger: Ledger, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        await network.rescan(vm=machine.vm, agent=machine.agent)
        noticed = asyncio.create_task(network.changed())
        await asyncio.sleep(0)
        await asyncio.to_thread(pod.run, "iptables", "-w", "-A", "INPUT", "-j", "ACCEPT")
        async with asyncio.timeout(DEADLINE_S):
            await noticed
        await network.rescan(vm=machine.vm, agent=machine.agent)
    assert "packet filter (nftables or iptables-nft)" in caplog.text
