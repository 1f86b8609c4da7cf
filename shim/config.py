"""The operator's configuration: a TOML file in which every key may be left out.

This module is on the start path: ``tomllib`` and ``difflib`` are imported only when there is a file.
"""

from __future__ import annotations

from shim.record import Record
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DEFAULT_PATH = "/etc/hako/config.toml"
ENVIRONMENT_VARIABLE = "HAKO_CONFIG"


class HypervisorConfig(Record):
    """How virtual machines are made."""

    #: QEMU's system emulator.
    qemu: str = "/usr/bin/qemu-system-x86_64"
    #: Appended to QEMU's ``-machine``, for example ``usb=off``.
    machine_options: str = ""
    #: How guest instructions run; ``auto`` takes KVM if it really runs guest code at speed.
    accelerator: str = "auto"
    #: How the agent is reached; ``auto`` takes the first of these that works.
    channel: str = "auto"
    #: What a machine has for itself; the limits of its containers come on top.
    vcpus: int = 1
    #: As ``vcpus``.
    memory_mib: int = 512
    #: What a machine can grow to; 0 is what the host has. Each vCPU that may come costs the guest half a MiB.
    max_vcpus: int = 0
    #: As ``max_vcpus``.
    max_memory_mib: int = 0
    #: Whether a machine keeps the size it starts with.
    static_sizing: bool = False
    #: How many PCI devices of the host (VFIO) a machine can be given; each costs 30 ms of boot under TCG.
    root_ports: int = 0
    #: Whether guests' memory is of the huge pages that the host has reserved; such machines boot cold.
    huge_pages: bool = False
    #: Path of the daemon, or ``auto`` to search for it.
    virtiofsd: str = "auto"
    #: Path of the daemon that serves ``vhost-user-vsock``, or ``auto`` to search for it.
    vsock_daemon: str = "auto"
    #: ``auto`` clones machines from one that was booted before, ``off`` boots each.
    template: str = "auto"
    #: Where templates are kept; only root may be able to enter it.
    template_dir: str = "/run/hako/templates"


class GuestConfig(Record):
    """What runs in a virtual machine."""

    #: What ``hako image build`` makes.
    kernel: str = "/var/lib/hako/guest/vmlinux"
    #: As ``kernel``.
    initrd: str = "/var/lib/hako/guest/initrd"
    #: Appended to the kernel's command line.
    kernel_parameters: str = ""
    #: How long a machine may take until its agent answers.
    boot_timeout_s: int = 60


class ShimConfig(Record):
    """How the shim itself behaves."""

    #: How containerd drives the shim; only 1.7 can use ``grpc``.
    protocol: str = "ttrpc"
    #: Of the lines that go to containerd's own log.
    log_level: str = "info"
    #: Whether shims are forked from a process that has imported everything already.
    zygote: bool = True
    #: Sockets, ledgers and shares of running sandboxes.
    state_dir: str = "/run/hako"
    #: Where the reason and the last console lines of a failed sandbox are kept for ``hako logs``.
    log_dir: str = "/var/log/hako"


class Config(Record):
    """The whole configuration, a section per subject."""

    hypervisor: HypervisorConfig = HypervisorConfig()
    guest: GuestConfig = GuestConfig()
    shim: ShimConfig = ShimConfig()


CHOICES = {
    "accelerator": ("auto", "kvm", "tcg"),
    "channel": ("auto", "vhost-vsock", "vhost-user-vsock", "virtio-serial"),
    "template": ("auto", "off"),
    "protocol": ("ttrpc", "grpc"),
    "log_level": ("debug", "info", "warning", "error"),
}
PATHS = ("qemu", "virtiofsd", "vsock_daemon", "template_dir", "kernel", "initrd", "state_dir", "log_dir")
#: Least and most that can be meant: 255 is as many as q35 numbers without an IOMMU, 16 TiB more than it maps.
RANGES = {
    "vcpus": (1, 255),
    "memory_mib": (128, 1 << 24),
    "max_vcpus": (0, 255),
    "max_memory_mib": (0, 1 << 24),
    "boot_timeout_s": (1, 3600),
}


_WANTED = {str: "a string in quotes", int: "a whole number", bool: "true or false"}


class ConfigText(Record):
    """A configuration as it was found: ``source`` names it in messages."""

    text: str
    source: str


def locate(
    environment: Mapping[str, str],
    *,
    options_path: str = "",
    options_body: str = "",
    default: str = DEFAULT_PATH,
) -> ConfigText:
    """Read the configuration that applies: the runtime options', ``HAKO_CONFIG``, the default file, nothing.

    What is said for one container or runtime class wins over what holds for all of containerd.

    :param environment: where ``HAKO_CONFIG`` may be set.
    :param options_path: the path in containerd's runtime options.
    :param options_body: the configuration in containerd's runtime options itself.
    :param default: the file that is read if it exists.
    :returns: the text, empty if there is no configuration.
    :raises Refusal: if a file that was asked for cannot be there or be read, or is not UTF-8.
    """
    if options_body and not options_path:
        return ConfigText(text=options_body, source="runtime options")
    path = options_path or environment.get(ENVIRONMENT_VARIABLE)
    try:
        with open(path or default, encoding="utf-8") as file:
            return ConfigText(text=file.read(), source=path or default)
    except FileNotFoundError as error:
        if path:
            raise Refusal(f"config: {path}: no such file; correct the path or create the file") from error
        return ConfigText(text="", source="defaults")
    except OSError as error:
        raise Refusal(f"config: {path or default}: {error.strerror}; make it readable") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"config: {path or default}: not UTF-8; save it as UTF-8") from error
    except ValueError as error:
        raise Refusal(f"config: {path!r}: {error}; correct the path") from error


def parse(found: ConfigText) -> Config:
    """Check a configuration and fill in the defaults.

    :param found: what ``locate`` returned.
    :returns: the configuration.
    :raises Refusal: if it is not TOML, has an unknown key, or a value of the wrong type or out of range.
    """
    if not found.text:
        return Config()
    import tomllib  # noqa: PLC0415 - 10 ms, paid only by who has a configuration

    try:
        tables = tomllib.loads(found.text)
    except (ValueError, RecursionError) as error:  # beyond syntax: numbers too long, arrays too deep
        raise Refusal(f"config: {found.source}: not TOML: {error}; correct that line") from error
    sections = {"hypervisor": HypervisorConfig, "guest": GuestConfig, "shim": ShimConfig}
    checked = {
        name: _section(_known(sections, name, found.source, "table"), table, f"{found.source}: {name}")
        for name, table in tables.items()
    }
    return Config(**checked)  # type: ignore[arg-type]  # each section was made by the class of its name


def _section(kind: type[Record], table: Any, where: str) -> Record:
    if not isinstance(table, dict):
        raise Refusal(f"config: {where}: not a table; write [{where.rpartition(' ')[2]}]")
    types = {name: type(getattr(kind, name)) for name in kind.fields()}
    for key, value in table.items():
        expected = _known(types, key, where, "key")
        # In Python a bool is an int; in TOML it is not.
        if type(value) is not expected:
            wanted = _WANTED[expected]
            raise Refusal(f"config: {where}.{key}: {value!r} has the wrong type; give {wanted}")
        _check_value(key, value, f"{where}.{key}")
    return kind(**table)


def _check_value(key: str, value: Any, where: str) -> None:
    if isinstance(value, str) and "\0" in value:
        raise Refusal(f"config: {where}: {value!r} holds a NUL character; no argument can, leave it out")
    choices = CHOICES.get(key)
    if choices is not None and value not in choices:
        raise Refusal(f"config: {where}: {value!r} is not offered; give one of {', '.join(choices)}")
    if key in PATHS and not (value.startswith("/") or value == getattr(HypervisorConfig, key, None)):
        raise Refusal(f"config: {where}: {value!r} is not an absolute path; begin it with /")
    if key in RANGES:
        least, most = RANGES[key]
        if value < least:
            raise Refusal(f"config: {where}: {value} is too small; give at least {least}")
        if value > most:
            raise Refusal(f"config: {where}: it is too large; give at most {most}")


def _known(offered: dict[str, type[Any]], name: str, where: str, what: str) -> type[Any]:
    if name in offered:
        return offered[name]
    import difflib  # noqa: PLC0415 - only a mistake needs it

    nearest = difflib.get_close_matches(name, offered, n=1, cutoff=0.0)[0]
    raise Refusal(f"config: {where}: unknown {what} {name!r}; the nearest valid {what} is {nearest!r}")
