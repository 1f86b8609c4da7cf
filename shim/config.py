"""The operator's configuration: TOML files in which every key is optional.

Each key is declared once, with its default, its meaning, its unit, and its possible values. Reading and
checking files, ``hako config`` and the documentation all use these declarations.

This module is on the start path: ``tomllib`` and ``difflib`` are imported only when there is a file.
"""

from __future__ import annotations

import os
import stat

from shim.record import Record
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, ClassVar, TypeVar

    _K = TypeVar("_K")
    _T = TypeVar("_T", str, int, bool)

DEFAULT_PATH = "/etc/hako/config.toml"
ENVIRONMENT_VARIABLE = "HAKO_CONFIG"
DEFAULTS = "default"
"""The source of a value that no file sets."""

_DROP_INS = "config.d"  # beside the default file
_AUTO = "auto"


class Key(Record):
    """The possible values of one key, and their meaning."""

    default: str | int | bool
    help: str
    #: The unit of a number; empty if it counts something that ``help`` names.
    unit: str = ""
    #: The offered values; empty if it is not a choice.
    choices: tuple[str, ...] = ()
    #: The least and the greatest value.
    least: int | None = None
    most: int | None = None
    #: Whether it is an absolute path.
    is_path: bool = False

    def values(self) -> str:
        """Describe the possible values of the key for people."""
        if self.choices:
            return ", ".join(self.choices)
        if isinstance(self.default, bool):
            return "true, false"
        if self.is_path:
            return f"a path, or {_AUTO}" if self.default == _AUTO else "a path"
        if isinstance(self.default, str):
            return "text"
        return "a number" if self.most is None else f"{self.least} to {self.most}"

    def check(self, value: Any, where: str) -> None:
        """Check a value that a file gives.

        :param value: the value as ``tomllib`` returns it.
        :param where: the file and the key, for the message.
        :raises Refusal: if it is of the wrong type, not offered or out of range.
        """
        expected = type(self.default)
        # In Python a bool is an int; in TOML it is not.
        if type(value) is not expected:
            raise Refusal(f"config: {where}: {value!r} has the wrong type; give {_WANTED[expected]}")
        if isinstance(value, str):
            self._check_text(value, where)
        else:
            self._check_number(value, where)

    def _check_text(self, value: str, where: str) -> None:
        if "\0" in value:
            raise Refusal(
                f"config: {where}: {value!r} contains a NUL character, which no argument can; leave it out"
            )
        if self.choices and value not in self.choices:
            raise Refusal(f"config: {where}: {value!r} is not offered; give one of {self.values()}")
        if self.is_path and not (value.startswith("/") or value == self.default):
            raise Refusal(f"config: {where}: {value!r} is not an absolute path; begin it with /")

    def _check_number(self, value: int, where: str) -> None:
        if self.least is not None and value < self.least:
            raise Refusal(f"config: {where}: {value} is too small; give at least {self.least}")
        if self.most is not None and value > self.most:
            raise Refusal(f"config: {where}: it is too large; give at most {self.most}")


_WANTED: dict[type, str] = {str: "a string in quotes", int: "a whole number", bool: "true or false"}
_declared: list[Key] = []


def _key(
    default: _T,
    meaning: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    least: int | None = None,
    most: int | None = None,
    is_path: bool = False,
) -> _T:
    """Declare a key of the class that is being defined; return its default."""
    _declared.append(
        Key(
            default=default,
            help=meaning,
            unit=unit,
            choices=choices,
            least=least,
            most=most,
            is_path=is_path,
        )
    )
    return default


class Section(Record):
    """A table of the configuration; each of its fields is a key."""

    KEYS: ClassVar[dict[str, Key]]

    def __init_subclass__(cls) -> None:
        """Collect the keys that the class body declares, in the same order."""
        cls.KEYS = dict(zip(cls.fields(), _declared, strict=True))
        _declared.clear()


class HypervisorConfig(Section):
    """The settings of virtual machines."""

    qemu: str = _key("/usr/bin/qemu-system-x86_64", "QEMU's system emulator.", is_path=True)
    machine_options: str = _key("", "Appended to QEMU's ``-machine``, for example ``usb=off``.")
    accelerator: str = _key(
        _AUTO,
        "How guest instructions run; ``auto`` chooses KVM if it really runs guest code at speed.",
        choices=(_AUTO, "kvm", "tcg"),
    )
    channel: str = _key(
        _AUTO,
        "How the agent is reached; ``auto`` chooses the first of these that works.",
        choices=(_AUTO, "vhost-vsock", "vhost-user-vsock", "virtio-serial"),
    )
    # Without an IOMMU, q35 can number 255 vCPUs; 16 TiB is more than it can map.
    vcpus: int = _key(
        1, "The vCPUs of the machine itself; the limits of its containers are added.", least=1, most=255
    )
    memory_mib: int = _key(
        512,
        "The memory of the machine itself; the limits of its containers are added.",
        unit="MiB",
        least=128,
        most=1 << 24,
    )
    max_vcpus: int = _key(
        0,
        "The most vCPUs that a machine can grow to; 0 means as many as the host has. "
        "Each vCPU that may be added costs the guest half a MiB.",
        least=0,
        most=255,
    )
    max_memory_mib: int = _key(
        0,
        "The most memory that a machine can grow to; 0 means as much as the host has.",
        unit="MiB",
        least=0,
        most=1 << 24,
    )
    static_sizing: bool = _key(default=False, meaning="Whether a machine keeps its initial size.")
    root_ports: int = _key(
        0,
        "How many PCI devices of the host (VFIO) a machine can get; each costs 30 ms of boot under TCG.",
        least=0,
        most=16,
    )
    huge_pages: bool = _key(
        default=False,
        meaning="Whether guests' memory is made of huge pages that the host has reserved; "
        "such machines boot cold.",
    )
    jail: str = _key(
        _AUTO,
        "Whether a sandbox's processes must be confined; ``auto`` means ``required`` with KVM, "
        "and ``preferred`` without.",
        choices=(_AUTO, "required", "preferred", "off"),
    )
    # Above the ids of people and the host's services, and below numbers that programs read as negative.
    jail_first_id: int = _key(
        1_900_000_000,
        "The first user and group id for sandboxes, which get one each; no other user may have these ids.",
        least=1 << 16,
        most=(1 << 31) - (1 << 20),
    )
    jail_ids: int = _key(65_536, "The number of these ids.", least=1, most=1 << 20)
    virtiofsd: str = _key(_AUTO, "Path of the daemon, or ``auto`` to search for it.", is_path=True)
    vsock_daemon: str = _key(
        _AUTO,
        "Path of the daemon that serves ``vhost-user-vsock``, or ``auto`` to search for it.",
        is_path=True,
    )
    template: str = _key(
        _AUTO,
        "``auto`` clones machines from one that was booted before; ``off`` boots each machine.",
        choices=(_AUTO, "off"),
    )
    template_dir: str = _key(
        "/run/hako/templates", "Where templates are kept; only root may be able to enter it.", is_path=True
    )

    park_after_s: int = _key(
        0,
        "After how long without need a machine is parked: all of its containers are paused, and its memory "
        "goes to a file. 0 means never.",
        unit="s",
        least=0,
        most=1 << 20,
    )
    park_dir: str = _key(
        "/var/lib/hako/parked",
        "Where the memory of parked machines goes, encrypted: a directory on a disk, which only root may "
        "be able to enter.",
        is_path=True,
    )


class GuestConfig(Section):
    """The software that runs in a virtual machine."""

    kernel: str = _key(
        "/var/lib/hako/guest/vmlinux", "The kernel; ``hako image build`` makes it.", is_path=True
    )
    initrd: str = _key(
        "/var/lib/hako/guest/initrd", "The initramfs; ``hako image build`` makes it.", is_path=True
    )
    kernel_parameters: str = _key("", "Appended to the kernel's command line.")
    boot_timeout_s: int = _key(
        60, "How long a machine's agent may take to answer.", unit="s", least=1, most=3600
    )
    debug: bool = _key(default=False, meaning="Whether ``hako exec`` runs commands as root in guests.")


class ShimConfig(Section):
    """The settings of the shim itself."""

    protocol: str = _key(
        "ttrpc",
        "How containerd drives the shim; only containerd 1.7 can use ``grpc``.",
        choices=("ttrpc", "grpc"),
    )
    log_level: str = _key(
        "info",
        "The lowest level of lines that go to containerd's own log.",
        choices=("debug", "info", "warning", "error"),
    )
    zygote: bool = _key(
        default=True, meaning="Whether shims are forked from a process that has already imported everything."
    )
    enable_annotations: str = _key(
        "io.hako.boot_timeout_s io.hako.max_memory_mib io.hako.max_vcpus io.hako.memory_mib "
        "io.hako.root_ports io.hako.static_sizing io.hako.template io.hako.vcpus "
        "io.katacontainers.config.hypervisor.default_* io.katacontainers.config.hypervisor.pcie_root_port",
        "The annotations by which pods may change their machines: whole names, separated by spaces; "
        "``*`` matches any text.",
    )
    tracing_endpoint: str = _key(
        "",
        "Where the phases of each start go as OpenTelemetry spans, by OTLP over HTTP, for example "
        "``http://127.0.0.1:4318/v1/traces``; nowhere if empty. It needs OpenTelemetry, which the "
        "Debian package contains, and which the extra ``tracing`` installs otherwise.",
    )
    state_dir: str = _key("/run/hako", "Sockets, ledgers and shares of running sandboxes.", is_path=True)
    log_dir: str = _key(
        "/var/log/hako",
        "Where the reason and the last console lines of a failed sandbox are kept for ``hako logs``.",
        is_path=True,
    )


class Config(Record):
    """The whole configuration, with one section for each subject."""

    hypervisor: HypervisorConfig = HypervisorConfig()
    guest: GuestConfig = GuestConfig()
    shim: ShimConfig = ShimConfig()


SECTIONS: dict[str, type[Section]] = {
    "hypervisor": HypervisorConfig,
    "guest": GuestConfig,
    "shim": ShimConfig,
}


class ConfigText(Record):
    """A configuration as it was found."""

    text: str
    #: Its name in messages, usually the path.
    source: str
    #: Files that are read after it; a value in a later file replaces one in an earlier file.
    drop_ins: tuple[ConfigText, ...] = ()


def locate(
    environment: Mapping[str, str],
    *,
    options_path: str = "",
    options_body: str = "",
    default: str = DEFAULT_PATH,
) -> ConfigText:
    """Read the configuration: that of the runtime options, of ``HAKO_CONFIG``, the default file, or none.

    A configuration for one container or runtime class replaces the one for all of containerd. Only the
    default file has drop-ins: ``config.d/*.toml``, in the order of their names.

    :param environment: where ``HAKO_CONFIG`` may be set.
    :param options_path: the path in containerd's runtime options.
    :param options_body: the configuration in containerd's runtime options itself.
    :param default: the file that is read if it exists.
    :returns: the text, empty if there is no configuration.
    :raises Refusal: if a file that was asked for does not exist, cannot be read, or is not UTF-8.
    """
    if options_body and not options_path:
        return ConfigText(text=options_body, source="runtime options")
    path = options_path or environment.get(ENVIRONMENT_VARIABLE)
    if path:
        if options_path and _is_special(path):  # an operator may name a pipe, a client may not
            raise Refusal(f"config: {path}: not a regular file; name one that is")
        text = _read(path)
        if text is None:
            raise Refusal(f"config: {path}: no such file; correct the path or create the file")
        return ConfigText(text=text, source=path)
    text = _read(default)
    return ConfigText(
        text=text or "",
        source=DEFAULTS if text is None else default,
        drop_ins=tuple(_drop_ins(os.path.join(os.path.dirname(default), _DROP_INS))),
    )


def located_at(path: str) -> ConfigText:
    """Read a configuration from a file, or from standard input if it is ``-``.

    :raises Refusal: if it cannot be read, or is not UTF-8.
    """
    if path == "-":
        import sys  # noqa: PLC0415 - only a command needs it

        return ConfigText(text=sys.stdin.read(), source="standard input")
    return locate({ENVIRONMENT_VARIABLE: path})


def _drop_ins(directory: str) -> Iterator[ConfigText]:
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    except OSError as error:
        raise Refusal(f"config: {directory}: {error.strerror}; make it readable") from error
    for name in names:
        if name.endswith(".toml") and not name.startswith("."):
            path = os.path.join(directory, name)
            text = _read(path)
            if text is not None:  # otherwise it has been removed by now
                yield ConfigText(text=text, source=path)


def _is_special(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # reading it tells why
        return False


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refusal(f"config: {path}: {error.strerror}; make it readable") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"config: {path}: not UTF-8; save it as UTF-8") from error
    except ValueError as error:
        raise Refusal(f"config: {path!r}: {error}; correct the path") from error


class Value(Record):
    """A value of the configuration, and the file that sets it."""

    value: str | int | bool
    source: str = DEFAULTS


def parse(found: ConfigText) -> Config:
    """Check a configuration and fill in the defaults.

    :param found: what ``locate`` returned.
    :returns: the configuration.
    :raises Refusal: if it is not TOML, has an unknown key, or a value of the wrong type or out of range.
    """
    given = values_of(found)
    sections: dict[str, Any] = {
        name: SECTIONS[name](**{key: each.value for key, each in values.items()})
        for name, values in given.items()
    }
    return Config(**sections)


def values_of(found: ConfigText) -> dict[str, dict[str, Value]]:
    """Check a configuration, and return the values of its files, by section and key.

    :param found: what ``locate`` returned.
    :raises Refusal: as :func:`parse`.
    """
    given: dict[str, dict[str, Value]] = {}
    for file in (found, *found.drop_ins):
        for name, table in _tables(file).items():
            where = f"{file.source}: {name}"
            keys = _known(SECTIONS, name, file.source, "table").KEYS
            if not isinstance(table, dict):
                raise Refusal(f"config: {where}: not a table; write [{name}]")
            for key, value in table.items():
                _known(keys, key, where, "key").check(value, f"{where}.{key}")
                given.setdefault(name, {})[key] = Value(value=value, source=file.source)
    return given


def _tables(file: ConfigText) -> dict[str, Any]:
    if not file.text:
        return {}
    import tomllib  # noqa: PLC0415 - 10 ms, only needed if there is a configuration

    try:
        return tomllib.loads(file.text)
    except (ValueError, RecursionError) as error:  # not only syntax errors: numbers too long, arrays too deep
        raise Refusal(f"config: {file.source}: not TOML: {error}; correct that line") from error


def render(config: Config) -> str:
    """Write a configuration as TOML, with only the values that differ from the defaults.

    :param config: the configuration.
    :returns: the text, from which :func:`parse` makes the same configuration; empty for the defaults.
    """
    lines = []
    for name, section in SECTIONS.items():
        values = getattr(config, name).as_dict()
        changed = {key: value for key, value in values.items() if value != section.KEYS[key].default}
        if changed:
            lines += [f"[{name}]\n", *(f"{key} = {toml(value)}\n" for key, value in changed.items())]
    return "".join(lines)


def toml(value: object) -> str:
    """Write a value as TOML: a string, a whole number, true or false."""
    if isinstance(value, str):
        # A basic string: characters that would end it and control characters are escaped.
        marks = (
            f"\\u{ord(mark):04X}" if mark in '"\\\x7f' or mark < " " else mark  # TOML 1.0, "String"
            for mark in value
        )
        return f'"{"".join(marks)}"'
    return str(value).lower()


def _known(offered: Mapping[str, _K], name: str, where: str, what: str) -> _K:
    if name in offered:
        return offered[name]
    import difflib  # noqa: PLC0415 - only a mistake needs it

    nearest = difflib.get_close_matches(name, offered, n=1, cutoff=0.0)[0]
    raise Refusal(f"config: {where}: unknown {what} {name!r}; the nearest valid {what} is {nearest!r}")
