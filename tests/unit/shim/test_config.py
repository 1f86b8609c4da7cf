"""The configuration: every key is optional, and every mistake is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.config import (
    Config,
    ConfigText,
    GuestConfig,
    HypervisorConfig,
    ShimConfig,
    Value,
    locate,
    parse,
    render,
    values_of,
)
from shim.refusal import Refusal

if TYPE_CHECKING:
    from typing import Any


def parsed(text: str) -> Config:
    return parse(ConfigText(text=text, source="config.toml"))


def message(text: str) -> str:
    with pytest.raises(Refusal) as caught:
        parsed(text)
    line = str(caught.value)
    assert line.startswith("config: config.toml: ")
    assert "; " in line
    assert "\n" not in line
    return line


def test_an_empty_file_means_the_defaults() -> None:
    assert parsed("") == Config()
    assert Config().hypervisor.memory_mib == 512
    assert Config().guest.kernel == "/var/lib/hako/guest/vmlinux"


def test_a_given_value_replaces_only_its_own_default() -> None:
    given = parsed('[hypervisor]\nvcpus = 2\n[guest]\ninitrd = "/i"\n[shim]\nlog_level = "debug"\n')
    assert given.hypervisor == HypervisorConfig(vcpus=2)
    assert given.guest == GuestConfig(initrd="/i")
    assert given.shim == ShimConfig(log_level="debug")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[hypervisor]\nvcpu = 1\n", "hypervisor: unknown key 'vcpu'; the nearest valid key is 'vcpus'"),
        ("[hypervisor]\nqwerty = 1\n", "unknown key 'qwerty'; the nearest valid key is "),
        ("[hypervizor]\n", "unknown table 'hypervizor'; the nearest valid table is 'hypervisor'"),
        ("memory_mib = 1\n", "unknown table 'memory_mib'; the nearest valid table is "),
        ("guest = 1\n", "guest: not a table; write [guest]"),
        ("[[guest]]\n", "guest: not a table; write [guest]"),
        ('[hypervisor]\nvcpus = "2"\n', "hypervisor.vcpus: '2' has the wrong type; give a whole number"),
        ("[hypervisor]\nvcpus = true\n", "hypervisor.vcpus: True has the wrong type; give a whole number"),
        ("[shim]\nzygote = 1\n", "shim.zygote: 1 has the wrong type; give true or false"),
        ("[hypervisor]\nvcpus = 1.5\n", "hypervisor.vcpus: 1.5 has the wrong type; give a whole number"),
        ("[guest]\nkernel = 1\n", "guest.kernel: 1 has the wrong type; give a string in quotes"),
        ("[hypervisor]\nvcpus = 0\n", "hypervisor.vcpus: 0 is too small; give at least 1"),
        ("[hypervisor]\nmemory_mib = 127\n", "memory_mib: 127 is too small; give at least 128"),
        ("[guest]\nboot_timeout_s = 0\n", "boot_timeout_s: 0 is too small; give at least 1"),
        ('[hypervisor]\naccelerator = "hvf"\n', "'hvf' is not offered; give one of auto, kvm, tcg"),
        ('[hypervisor]\nchannel = "tcp"\n', "'tcp' is not offered; give one of auto, vhost-vsock, "),
        ('[shim]\nprotocol = "http"\n', "'http' is not offered; give one of ttrpc, grpc"),
        ('[shim]\nlog_level = "loud"\n', "'loud' is not offered; give one of debug, "),
        ('[hypervisor]\nqemu = "qemu"\n', "hypervisor.qemu: 'qemu' is not an absolute path; begin it with /"),
        ('[guest]\nkernel = "auto"\n', "guest.kernel: 'auto' is not an absolute path; begin it with /"),
        ("[hypervisor\n", "not TOML: "),
        ("[guest]\nkernel = '/a'\nkernel = '/b'\n", "not TOML: "),
    ],
)
def test_a_mistake_is_named_with_its_remedy(text: str, expected: str) -> None:
    assert expected in message(text)


@pytest.mark.parametrize("key", ["virtiofsd", "vsock_daemon"])
def test_a_daemon_is_searched_for_or_given(key: str) -> None:
    assert getattr(parsed(f'[hypervisor]\n{key} = "auto"\n').hypervisor, key) == "auto"
    assert getattr(parsed(f'[hypervisor]\n{key} = "/d"\n').hypervisor, key) == "/d"


def test_options_override_the_environment_and_the_environment_the_default(tmp_path: Path) -> None:
    paths = {}
    for name in ("environment", "options", "default"):
        paths[name] = str(tmp_path / name)
        (tmp_path / name).write_text(f"# {name}")
    environment = {"HAKO_CONFIG": paths["environment"]}
    body = "# body"

    def found(environment: dict[str, str], **given: str) -> str:
        return locate(environment, default=paths["default"], **given).text

    assert found(environment, options_path=paths["options"], options_body=body) == "# options"
    assert found(environment, options_body=body) == "# body"
    assert found(environment) == "# environment"
    assert found({}) == "# default"


def test_the_default_file_need_not_exist(tmp_path: Path) -> None:
    assert locate({}, default=str(tmp_path / "none")) == ConfigText(text="", source="default")


@pytest.mark.parametrize("given", [{"environment": "HAKO_CONFIG"}, {"options": "path"}])
def test_a_file_that_was_asked_for_must_exist(tmp_path: Path, given: dict[str, str]) -> None:
    path = str(tmp_path / "none")
    environment = {"HAKO_CONFIG": path} if "environment" in given else {}
    with pytest.raises(Refusal, match="no such file; correct the path"):
        locate(environment, options_path=path if "options" in given else "")


def test_a_directory_is_refused_as_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="Is a directory"):
        locate({"HAKO_CONFIG": str(tmp_path)})


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"# \xe4")
    with pytest.raises(Refusal, match="not UTF-8; save it as UTF-8"):
        locate({"HAKO_CONFIG": str(tmp_path / "latin")})


def test_drop_in_files_override_the_default_file_in_order_of_name(tmp_path: Path) -> None:
    default = tmp_path / "config.toml"
    default.write_text("[hypervisor]\nvcpus = 2\nmemory_mib = 256\n")
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "20-size.toml").write_text("[hypervisor]\nvcpus = 4\n")
    (tmp_path / "config.d" / "10-size.toml").write_text("[hypervisor]\nvcpus = 3\n")
    (tmp_path / "config.d" / "30-log.toml").write_text('[shim]\nlog_level = "debug"\n')
    (tmp_path / "config.d" / "40.toml.orig").write_text("no TOML")
    (tmp_path / "config.d" / ".50.toml").write_text("no TOML")

    config = parse(locate({}, default=str(default)))

    assert config.hypervisor == HypervisorConfig(vcpus=4, memory_mib=256)
    assert config.shim == ShimConfig(log_level="debug")


def test_a_mistake_in_a_drop_in_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "a.toml").write_text("[hypervisor]\nvcpus = 0\n")

    with pytest.raises(Refusal, match=r"config\.d/a\.toml: hypervisor\.vcpus: 0 is too small"):
        parse(locate({}, default=str(tmp_path / "config.toml")))


def test_only_a_file_given_by_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "a.toml").write_text("[hypervisor]\nvcpus = 2\n")

    assert parse(locate({"HAKO_CONFIG": str(tmp_path / "config.toml")})) == Config()


def test_the_effective_configuration_names_the_file_of_each_value(tmp_path: Path) -> None:
    default = tmp_path / "config.toml"
    default.write_text("[hypervisor]\nvcpus = 2\nmemory_mib = 256\n")
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "a.toml").write_text("[hypervisor]\nvcpus = 4\n")

    given = values_of(locate({}, default=str(default)))

    assert given == {
        "hypervisor": {
            "vcpus": Value(value=4, source=str(tmp_path / "config.d" / "a.toml")),
            "memory_mib": Value(value=256, source=str(default)),
        }
    }


def test_default_values_are_not_written() -> None:
    assert render(Config()) == ""


def test_only_values_that_differ_from_the_defaults_are_written() -> None:
    config = Config(hypervisor=HypervisorConfig(vcpus=2, huge_pages=True), guest=GuestConfig(kernel='/a"b'))

    assert render(config) == '[hypervisor]\nvcpus = 2\nhuge_pages = true\n[guest]\nkernel = "/a\\u0022b"\n'


@pytest.mark.parametrize("section", [HypervisorConfig, GuestConfig, ShimConfig])
def test_every_key_is_described_and_accepts_its_default(section: Any) -> None:
    for name, key in section.KEYS.items():
        assert key.help.endswith(".")
        assert getattr(section(), name) == key.default
        key.check(key.default, name)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        Config().hypervisor.vcpus = 4  # type: ignore[misc]  # the error under test


def test_every_key_is_used() -> None:
    root = Path(__file__).parents[3] / "shim"
    sources = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "config.py")
    keys = {key for section in (HypervisorConfig, GuestConfig, ShimConfig) for key in section.fields()}
    assert {key for key in keys if not re.search(rf"\.{key}\b", sources)} == set()
