"""The annotations by which a pod changes the configuration of its own machine.

Each is declared once: the key that it sets, and the risk for an operator who allows it. Values and ranges are
those of the key. The operator's ``[shim] enable_annotations`` says which pods may use. Names that begin with
``io.katacontainers.config.`` are Kata's and mean the same here.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proto import extensions
from shim.config import SECTIONS, Config
from shim.errors import InvalidArgument
from shim.machine.sizing import MIB, plan
from shim.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shim.config import Key

log = logging.getLogger(__name__)

OWN, KATA = "io.hako.", "io.katacontainers."
_KATA_CONFIG = f"{KATA}config."
#: Prefixes of annotations from the shim to Hako's agent; these are not configuration.
_FOR_THE_AGENT = (
    extensions.UNIFIED_ANNOTATION,
    extensions.DEFAULT_ERRNO_ANNOTATION,
    extensions.UMASK_ANNOTATION,
    extensions.AT_LEAST_ANNOTATION,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """An annotation that has an effect.

    :param name: its whole name.
    :param section: the section of the key that it sets.
    :param key: the key.
    :param only: its possible values, if they are fewer than the key's.
    :param adds: whether the value is appended to the operator's.
    :param fraction: whether the value may have a fraction, which is rounded up.
    :param risk: what a pod could do with it that an operator may not want; empty if nothing.
    """

    name: str
    section: str
    key: str
    only: tuple[str, ...] = ()
    adds: bool = False
    fraction: bool = False
    risk: str = ""

    @property
    def declaration(self) -> Key:
        """The declaration of its key."""
        return SECTIONS[self.section].KEYS[self.key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """An annotation for Kata that asks for something that Hako always does.

    :param name: its whole name.
    :param values: the values for which that is true.
    """

    name: str
    values: tuple[str, ...]


_READS_A_PATH = "names a file of the host"
_CHANGES_GUEST = "can weaken the guest's kernel"
_CHANGES_QEMU = "changes the machine that QEMU emulates"
_FILLS_A_DISK = "moves the pod's memory to a disk of the host"
_TAKES_RESERVED = "takes memory that the host has reserved"

_OWN = (
    ("hypervisor", "vcpus", ""),
    ("hypervisor", "memory_mib", ""),
    ("hypervisor", "max_vcpus", ""),
    ("hypervisor", "max_memory_mib", ""),
    ("hypervisor", "static_sizing", ""),
    ("hypervisor", "root_ports", ""),
    ("hypervisor", "huge_pages", _TAKES_RESERVED),
    ("hypervisor", "machine_options", _CHANGES_QEMU),
    ("hypervisor", "park_after_s", _FILLS_A_DISK),
    ("guest", "boot_timeout_s", ""),
    ("guest", "kernel", _READS_A_PATH),
    ("guest", "initrd", _READS_A_PATH),
    ("guest", "kernel_parameters", _CHANGES_GUEST),
)
_ADDED = {"machine_options", "kernel_parameters"}
_OF_KATA = (
    ("default_vcpus", "hypervisor", "vcpus"),
    ("default_memory", "hypervisor", "memory_mib"),
    ("default_max_vcpus", "hypervisor", "max_vcpus"),
    ("pcie_root_port", "hypervisor", "root_ports"),
    ("enable_hugepages", "hypervisor", "huge_pages"),
    ("machine_accelerators", "hypervisor", "machine_options"),
    ("kernel", "guest", "kernel"),
    ("initrd", "guest", "initrd"),
    ("kernel_params", "guest", "kernel_parameters"),
)
_RISKS = {key: risk for _, key, risk in _OWN}

#: Every annotation that has an effect, by its name.
ANNOTATIONS: dict[str, Annotation] = {
    each.name: each
    for each in (
        Annotation(name=f"{OWN}template", section="hypervisor", key="template", only=("off",)),
        *(
            Annotation(name=OWN + key, section=section, key=key, adds=key in _ADDED, risk=risk)
            for section, key, risk in _OWN
        ),
        *(
            Annotation(
                name=f"{_KATA_CONFIG}hypervisor.{name}",
                section=section,
                key=key,
                adds=key in _ADDED,
                fraction=key == "vcpus",
                risk=_RISKS[key],
            )
            for name, section, key in _OF_KATA
        ),
    )
}
#: Things that Hako always does, by Kata's annotation for them.
FACTS: dict[str, Fact] = {
    each.name: each
    for each in (
        Fact(name=f"{_KATA_CONFIG}hypervisor.machine_type", values=("q35",)),
        Fact(name=f"{_KATA_CONFIG}hypervisor.shared_fs", values=("virtio-fs",)),
        Fact(name=f"{_KATA_CONFIG}hypervisor.enable_virtio_mem", values=("true",)),
        Fact(name=f"{_KATA_CONFIG}hypervisor.block_device_driver", values=("virtio-blk",)),
        Fact(name=f"{_KATA_CONFIG}hypervisor.reclaim_guest_freed_memory", values=("true",)),
        *(
            Fact(name=f"{_KATA_CONFIG}hypervisor.{name}", values=("false",))
            for name in (
                "enable_mem_prealloc",
                "enable_guest_swap",
                "enable_iommu",
                "disable_block_device_use",
            )
        ),
        Fact(name=f"{_KATA_CONFIG}runtime.disable_guest_seccomp", values=("false",)),
        Fact(name=f"{_KATA_CONFIG}runtime.internetworking_model", values=("tcfilter",)),
        Fact(name=f"{_KATA_CONFIG}runtime.disable_new_netns", values=("false",)),
        Fact(name=f"{_KATA_CONFIG}agent.enable_tracing", values=("false",)),
    )
}
_SIZES = ("vcpus", "max_vcpus", "memory_mib", "max_memory_mib")


def applied(config: Config, spec: Mapping[str, Any], *, phase: str) -> Config:
    """Change the operator's configuration as a pod or container asks in its annotations.

    :param config: the operator's.
    :param spec: an OCI specification.
    :param phase: for the message.
    :returns: the same configuration if there is nothing to change.
    :raises InvalidArgument: if an annotation is unknown, not allowed, or has an invalid value for its key;
        the message names it.
    """
    asked = list(_asked(spec))
    if not asked:
        return config
    allowed = config.shim.enable_annotations.split()
    changes: dict[tuple[str, str], tuple[str, str | int | bool]] = {}
    for name, text in asked:
        try:
            found = _understood(name, text, allowed)
            if found is None:
                continue
            value = _value(found, text, config)
            _check_size(found.key, config, value=value)
            earlier, given = changes.setdefault((found.section, found.key), (name, value))
            if given != value:
                raise Refusal(f"{earlier} says otherwise; remove one of them from the pod")
        except Refusal as refusal:
            raise InvalidArgument(f"{phase}: annotation {name}: {refusal}") from refusal
    return _changed(config, {key: value for key, (_, value) in changes.items()})


def _asked(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    annotations = spec.get("annotations")
    for name, text in sorted(annotations.items()) if isinstance(annotations, dict) else ():
        if name.startswith(_FOR_THE_AGENT) or not isinstance(text, str):
            continue
        if name.startswith((OWN, _KATA_CONFIG)):
            yield name, text
        elif name.startswith(KATA):
            log.warning("annotation %s: only those below %s have an effect; ignored", name, _KATA_CONFIG)


def _understood(name: str, text: str, allowed: Iterable[str]) -> Annotation | None:
    """Find an annotation; None if it asks for something that Hako always does."""
    fact = FACTS.get(name)
    if fact is not None:
        if text in fact.values:
            return None
        raise Refusal(f"{text!r} cannot be had; only {', '.join(fact.values)}: change the pod")
    found = ANNOTATIONS.get(name)
    if found is None:
        raise Refusal(f"Hako has no such setting{_nearest(name)}; remove it from the pod")
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed):
        raise Refusal(
            "not allowed on this host; remove it from the pod, or add it to [shim] enable_annotations"
        )
    return found


def _nearest(name: str) -> str:
    import difflib  # noqa: PLC0415 - only a mistake needs it

    nearest = difflib.get_close_matches(name, ANNOTATIONS, n=1, cutoff=0.8)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def _value(found: Annotation, text: str, config: Config) -> str | int | bool:
    key = found.declaration
    if found.only and text not in found.only:
        raise Refusal(f"{text!r} is not offered; give {', '.join(found.only)}")
    value: str | int | bool = text
    if isinstance(key.default, bool):
        if text not in {"true", "false"}:
            raise Refusal(f"{text!r} is not a truth value; give true or false")
        value = text == "true"
    elif isinstance(key.default, int):
        value = _number(text, fraction=found.fraction)
    elif found.adds:
        value = f"{getattr(getattr(config, found.section), found.key)}{_separator(found, config)}{text}"
    try:
        key.check(value, "")
    except Refusal as refusal:
        raise Refusal(str(refusal).removeprefix("config: : ")) from refusal
    return value


def _separator(found: Annotation, config: Config) -> str:
    if not getattr(getattr(config, found.section), found.key):
        return ""
    return "," if found.key == "machine_options" else " "


def _number(text: str, *, fraction: bool) -> int:
    digits, point, rest = text.partition(".")
    # int() also accepts spaces, underscores and other scripts' digits, and is slow with thousands of digits.
    parts = (digits, rest) if fraction and point else (text,)
    if not all(part.isascii() and part.isdecimal() and len(part) <= 10 for part in parts):
        raise Refusal(f"{text[:40]!r} is not a{'' if fraction else ' whole'} number; give its digits")
    return math.ceil(float(text)) if fraction else int(text)


def _check_size(key: str, config: Config, *, value: str | int | bool) -> None:
    """Refuse a value above the limit of this host."""
    if key not in _SIZES:
        return
    if value == 0 and getattr(config.hypervisor, key) != 0:
        raise Refusal(f"0 is all that the host has, and [hypervisor] {key} allows less; ask for less")
    most = plan(_changed(config, {("hypervisor", "static_sizing"): False}).hypervisor).most
    limit = most.vcpus if key.endswith("vcpus") else most.memory_bytes // MIB
    if value > limit:  # type: ignore[operator] # these keys are numbers
        setting = f"[hypervisor] {key if key.startswith('max_') else f'max_{key}'}"
        raise Refusal(f"a machine may have {limit} at most; ask for less, or raise {setting}")


def _changed(config: Config, changes: Mapping[tuple[str, str], object]) -> Config:
    sections = {
        name: kind(
            **getattr(config, name).as_dict()
            | {key: value for (section, key), value in changes.items() if section == name}
        )
        for name, kind in SECTIONS.items()
    }
    return Config(**sections)  # type: ignore[arg-type] # each is of its own class
