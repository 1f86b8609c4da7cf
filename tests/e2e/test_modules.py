"""A container's kernel loads modules from the host: packet filters, kinds of interfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.mostly_on("1.7-ttrpc")]
ADMINISTRATOR = ["--rm", "--cap-add", "CAP_NET_ADMIN", "--cap-add", "CAP_NET_RAW"]
# The tests' image has no iptables; the host's programs are seen below /host.
HOST = ["--mount", "type=bind,src=/,dst=/host,options=bind:ro"]
REDIRECT = "-t nat -A OUTPUT -p tcp -m owner ! --uid-owner 1337 -m tcp"


def test_an_interface_of_another_kind_makes_the_kernel_load_its_driver(stack: Stack, container: str) -> None:
    script = "ip link add other type dummy && ip -o link show other; cut -d' ' -f1 /proc/modules | grep dummy"
    result = stack.containerd.run(IMAGE, container, "sh", "-c", script, options=ADMINISTRATOR)

    assert (result.code, result.stderr) == (0, "")
    assert "other" in result.stdout
    assert result.stdout.endswith("dummy\n")


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_a_container_redirects_its_traffic_as_a_service_mesh_does(
    stack: Stack, container: str, kind: str
) -> None:
    script = f"""
        ip link set lo up
        # The host may lack the usual lock file, and cannot be written to here.
        export XTABLES_LOCKFILE=/etc/passwd
        for ip in iptables ip6tables; do
            chroot /host /usr/sbin/$ip-{kind} {REDIRECT} --dport 80 -j REDIRECT --to-ports 15001 || exit 1
        done
        echo from the proxy | nc -l -p 15001 &
        until grep -qs ':3A99 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
        nc 127.0.0.1 80 </dev/null
    """
    result = stack.containerd.run(IMAGE, container, "sh", "-c", script, options=[*ADMINISTRATOR, *HOST])

    assert (result.code, result.stdout) == (0, "from the proxy\n"), result.stderr
