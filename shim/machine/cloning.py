"""The template that a machine is cloned from, and the blame if the clone does not answer."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import GuestLateError, HypervisorError, TemplateLateError, template_key
from shim.errors import DeadlineExceeded
from shim.machine import template_builder
from shim.machine.pod import refuses_template
from shim.machine.sizing import plan
from shim.machine.template_store import TemplateStore
from shim.refusal import Refusal

if TYPE_CHECKING:
    import socket

    from hypervisor import QemuHypervisor, VmSpec
    from shim.config import Config
    from shim.machine.pod import PodSpec
    from shim.machine.sizing import Plan
    from shim.machine.template_store import Template

log = logging.getLogger(__name__)

LATE = (TemplateLateError, GuestLateError, DeadlineExceeded)
"""The errors of a late clone; its template or the host may be to blame."""

_STARVED_TIMES = 4


async def dial_clone(vm: QemuHypervisor, port: int, *, timeout_s: float) -> socket.socket:
    """Connect to a clone; wait longer if it hardly had a processor, because a boot would need even more.

    :param vm: the clone.
    :param port: the guest's port.
    :param timeout_s: how long it may take, in seconds, up to four times if the host leaves it no processor.
    :raises ChannelError: if it does not answer, or has ended.
    """
    for _ in range(_STARVED_TIMES - 1):
        try:
            return await vm.connect(port, timeout_s=timeout_s)
        except GuestLateError as error:
            if not vm.is_starved:
                raise
            log.info(
                "boot: the clone waits for a processor more than it runs, so it gets more time: %s", error
            )
    return await vm.connect(port, timeout_s=timeout_s)


def blames_template(error: Exception, *, starved: bool) -> bool:
    """Tell whether the failure of a clone is the fault of its template, not of a busy host.

    :param error: the failure.
    :param starved: whether the clone's QEMU waited for a processor for longer than it had one.
    """
    return not (starved and isinstance(error, LATE))


def clone_of(spec: VmSpec, sizes: Plan, template: Template | None) -> VmSpec:
    """Describe the machine to clone; one that can grow has the common initial size.

    :param spec: the machine as it would boot.
    :param sizes: its size at the start, and how it may grow.
    :param template: the template that it is cloned from, if known.
    """
    size = sizes.boot if sizes.most == sizes.boot else sizes.base
    return dataclasses.replace(
        spec,
        vcpus=size.vcpus,
        memory_bytes=size.memory_bytes,
        template=template.path if template else None,
    )


class Cloning:
    """The choice of a template for one machine, and the judgement on it.

    :param sandbox_id: the sandbox's id, for the log.
    :param config: the operator's configuration.
    """

    def __init__(self, sandbox_id: str, *, config: Config) -> None:
        self.templates = TemplateStore(Path(config.hypervisor.template_dir))
        #: Whether the machine could have been cloned, had there been a template.
        self.lacks_template = False
        #: Whether a template was looked for and found: ``hit`` or ``miss``; empty if none was wanted.
        self.outcome = ""
        self._id = sandbox_id
        self._config = config.hypervisor

    def find(self, spec: VmSpec, sizes: Plan, pod: PodSpec, *, is_usual: bool = True) -> Template | None:
        """Find the template for a machine, or log why there is none.

        :param spec: the machine.
        :param sizes: its size at the start, and how it may grow.
        :param pod: its pod.
        :param is_usual: whether the machine is as the operator configured it; others get no template.
        """
        if self._config.template == "off":
            return None
        if spec.huge_pages:
            log.info(
                "boot: sandbox %s: its memory consists of huge pages, which cannot be cloned; boots cold",
                self._id,
            )
            return None
        if refuses_template(pod.oci):
            log.info("boot: sandbox %s: wants no clone; boots cold", self._id)
            return None
        try:
            key = template_key(clone_of(spec, sizes, None))
            template = self.templates.find(key)
            self.outcome = "hit" if template else "miss"
            if template is None:
                why = self.templates.failure(key)
                # There are too many other sizes to have a template for each.
                self.lacks_template = not why and is_usual and sizes.most == plan(self._config).most
                if not why and self.templates.is_building():
                    why, self.lacks_template = "one is being built", False
                log.info("boot: template %.12s: %s; boots cold", key, why or "there is none yet")
        except (Refusal, HypervisorError, OSError) as error:
            log.warning("boot: %s; boots cold", error)
            return None
        return template

    def judge(self, template: Template, error: Exception, *, starved: bool) -> None:
        """Keep or remove the template of a clone that did not start, and log the decision.

        :param template: the template.
        :param error: the clone's failure.
        :param starved: whether the clone's QEMU waited for a processor for longer than it had one.
        """
        self.outcome = "miss"
        advice = 'if clones keep failing on this host, set [hypervisor] template = "off"'
        to_blame = blames_template(error, starved=starved)
        try:
            if not to_blame or (isinstance(error, LATE) and not self.templates.is_late(template)):
                fate = "it is kept, because the host may only be busy"
            else:
                self.templates.discard(template, reason=str(error))
                self.lacks_template = not self.templates.failure(template.key)
                fate = "it is removed"
        except OSError as failure:
            fate = f"it cannot be removed: {failure}"
        log.warning(
            "boot: template %.12s: %s; %s, and the machine boots cold; %s", template.key, error, fate, advice
        )

    async def build_what_lacks(self, config_text: str, *, mount_namespace: int | None) -> None:
        """Let a template be built in the background if the machine could have used one.

        :param config_text: the text of the configuration.
        :param mount_namespace: where the builder runs, open; None is this process's own.
        """
        if self.lacks_template:
            await template_builder.start_unless_building(
                config_text, self.templates, mount_namespace=mount_namespace
            )
