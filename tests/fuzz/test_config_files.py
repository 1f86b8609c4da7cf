"""Any text for a configuration is accepted or refused in one line; what is accepted is usable."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shim.config import Config, ConfigText, GuestConfig, HypervisorConfig, ShimConfig, locate, parse, render
from shim.refusal import Refusal
from tests.fuzz.material import bent, texts
from tests.waiting import settle

if TYPE_CHECKING:
    from typing import Any


CASES = settings().max_examples

SECTIONS = {"hypervisor": HypervisorConfig, "guest": GuestConfig, "shim": ShimConfig}


def _toml(value: object) -> str:
    return repr(value).lower() if isinstance(value, bool) else repr(value)


KINDS: dict[str, Any] = dict(SECTIONS)
VALID = "".join(
    f"[{name}]\n" + "".join(f"{key} = {_toml(getattr(kind, key))}\n" for key in kind.fields())
    for name, kind in KINDS.items()
)

values = st.one_of(
    st.sampled_from(["1", "0", "-1", "true", '""', "[]", "{}", "1979-05-27", "1.5", "inf", "nan", "9" * 30]),
    st.integers().map(str),
    texts.map(lambda text: '"' + "".join(f"\\U{ord(mark):08X}" for mark in text) + '"'),
)
keys = st.sampled_from(sorted({key for kind in KINDS.values() for key in kind.fields()} | {"x", '""'}))
assignments = st.builds(lambda key, value: f"{key} = {value}\n", keys, values)
tables = st.builds(
    lambda name, lines: f"[{name}]\n" + "".join(lines),
    st.sampled_from([*SECTIONS, "x", '""', "shim.x"]),
    st.lists(assignments, max_size=3),
)
documents = st.one_of(
    st.text(max_size=60),
    st.lists(tables, max_size=3).map("".join),
    bent(st.just(VALID.encode())).map(lambda data: data.decode(errors="replace")),
)


def test_the_text_is_valid_before_it_is_corrupted() -> None:
    assert parse(ConfigText(text=VALID, source="test")) == Config()


async def deadline(seconds: Any) -> None:
    async with asyncio.timeout(seconds):
        await settle()


@settings(max_examples=3 * CASES)
@given(text=documents)
@example(text="x = " + "[" * 5000 + "]" * 5000)
@example(text="x = " + "9" * 5000)
@example(text=f"[guest]\nboot_timeout_s = {10**400}")
@example(text=f"[hypervisor]\nmemory_mib = {10**20}")
@example(text=f"[hypervisor]\nvcpus = {10**20}")
@example(text='[shim]\nstate_dir = "/run/\\u0000"')
@example(text='[hypervisor]\nmachine_options = "a\\u0000"')
@example(text='[guest]\nkernel_parameters = "a\\nb"')
def test_any_configuration(text: str) -> None:
    try:
        config = parse(ConfigText(text=text, source="test"))
    except Refusal as refusal:
        assert str(refusal).startswith("config: test")  # noqa: PT017 - a refusal is one of the two right outcomes
        return
    assert parse(ConfigText(text=render(config), source="test")) == config
    for section in (config.hypervisor, config.guest, config.shim):
        for value in section.as_dict().values():
            assert not isinstance(value, str) or "\0" not in value
    assert 1 <= config.hypervisor.vcpus < 1 << 16
    assert config.hypervisor.memory_mib << 20 < 1 << 63
    asyncio.run(deadline(config.guest.boot_timeout_s))


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 300, "/proc/self/mem", "/dev"])
def test_an_unreadable_path_in_the_options_is_refused(path: str) -> None:
    with pytest.raises(Refusal):
        locate({}, options_path=path)
