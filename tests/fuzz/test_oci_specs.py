"""Any specification is translated, or refused by naming what is wrong; paths stay inside the share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto.containerd import task_v3_pb2
from shim.agent.oci import translate, translate_resources
from shim.agent.oci_process import translate_process
from shim.errors import InvalidArgument
from shim.sandbox.inheritance import Inheritance
from tests.fuzz.material import LONG, PROCESS, RESOURCES, SPEC, bent_json, json_values

if TYPE_CHECKING:
    from typing import Any


NOTHING = Inheritance({}, oom_score_adj=0)
CASES = settings().max_examples

objects = st.dictionaries(st.sampled_from([*sorted(SPEC), "", "x"]), json_values, max_size=4)
specs = st.one_of(objects, bent_json(SPEC))
processes = st.one_of(
    st.dictionaries(st.sampled_from(sorted(PROCESS)), json_values, max_size=4), bent_json(PROCESS)
)
limits = st.one_of(
    st.dictionaries(st.sampled_from(sorted(RESOURCES)), json_values, max_size=4), bent_json(RESOURCES)
)

DEEP = "[" * 5_000 + "]" * 5_000


def mounted(**changes: str) -> dict[str, Any]:
    entry = {"destination": "/d", "type": "bind", "source": "/etc/hosts", "options": ["rbind"]} | changes
    return SPEC | {"mounts": [entry]}


@settings(max_examples=5 * CASES)
@given(spec=specs, seccomp=st.booleans())
@example(spec=mounted(destination="/a/.."), seccomp=True)
@example(spec=mounted(destination=f"/{LONG[:255]}"), seccomp=True)
@example(spec=mounted(destination=f"/{'é' * 127}"), seccomp=True)
@example(spec=mounted(destination="/a\0b"), seccomp=True)
@example(spec=mounted(destination="/a\nb"), seccomp=True)
def test_a_specification_is_translated_or_refused(spec: Any, seccomp: Any) -> None:
    try:
        translation = translate(
            spec,
            container_id="box",
            sandbox_id="pod",
            terminal=False,
            seccomp=seccomp,
            inheritance=NOTHING,
        )
    except InvalidArgument as error:
        assert str(error)  # noqa: PT017 - a refusal is one of the two right outcomes
        return
    translation.spec.SerializeToString()
    for mount, share in zip(translation.spec.Mounts, translation.shared_mounts, strict=True):
        assert share is None or share.destination == mount.destination


@settings(max_examples=2 * CASES)
@given(process=processes, terminal=st.booleans())
def test_a_process_is_translated_or_refused(process: Any, terminal: Any) -> None:
    try:
        translate_process(process, terminal=terminal, inheritance=NOTHING).SerializeToString()
    except InvalidArgument as error:
        assert str(error)  # noqa: PT017 - a refusal is one of the two right outcomes


@settings(max_examples=2 * CASES)
@given(resources=limits)
def test_limits_are_translated_or_refused(resources: Any) -> None:
    try:
        translate_resources(resources).SerializeToString()
    except InvalidArgument as error:
        assert str(error)  # noqa: PT017 - a refusal is one of the two right outcomes


def as_text(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(values.map(json.dumps), json_values.map(json.dumps))


@settings(max_examples=2 * CASES)
@given(text=as_text(specs))
@example(text=DEEP)
@example(text='{"process":{"args":["true"],"cwd":"/"},"root":{"path":"root\\u0000fs"}}')
@example(text=json.dumps(mounted(source="")))
@example(text=json.dumps(mounted(source="hosts")))
@example(text=json.dumps(mounted(source="/etc/\0")))
@example(text=json.dumps(mounted(source=f"/{LONG}")))
@example(text=json.dumps(mounted(source="/dev/null")))
def test_a_bundle_with_any_specification(shim: Any, text: Any) -> None:
    bundle = shim.write_bundle("specified", text)
    with shim.connect() as peer:
        request = task_v3_pb2.CreateTaskRequest(id="specified", bundle=str(bundle))
        if peer.ask("Create", request) == 0:
            shim.remove("specified")
    shim.assert_serves()


@settings(max_examples=2 * CASES)
@given(text=as_text(processes))
@example(text=DEEP)
def test_any_exec(shim: Any, text: Any) -> None:
    shim.ensure_running()
    with shim.connect() as peer:
        request = task_v3_pb2.ExecProcessRequest(id="box", exec_id="hostile")
        request.spec.value = text.encode()
        if peer.ask("Exec", request) == 0:
            start = task_v3_pb2.StartRequest(id="box", exec_id="hostile")
            if peer.ask("Start", start) == 0:
                peer.ask("Kill", task_v3_pb2.KillRequest(id="box", exec_id="hostile", signal=9))
                assert peer.ask("Wait", task_v3_pb2.WaitRequest(id="box", exec_id="hostile")) == 0
            assert peer.ask("Delete", task_v3_pb2.DeleteRequest(id="box", exec_id="hostile")) == 0
    shim.assert_serves()


@settings(max_examples=2 * CASES)
@given(text=as_text(limits))
@example(text=DEEP)
def test_any_update(shim: Any, text: Any) -> None:
    shim.ensure_running()
    with shim.connect() as peer:
        request = task_v3_pb2.UpdateTaskRequest(id="box")
        request.resources.type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
        request.resources.value = text.encode()
        peer.ask("Update", request)
    shim.assert_serves()


_ROOTFS = {
    "no such type": {"type": "nofs", "source": "x"},
    "no source": {"type": "bind", "source": "/no/such/place", "options": ["bind"]},
    "nul in the source": {"type": "bind", "source": "/etc\0/x", "options": ["bind"]},
    "nul in the target": {"type": "bind", "source": "/etc", "target": "a\0b", "options": ["bind"]},
    "target outside": {"type": "bind", "source": "/etc", "target": "../x", "options": ["bind"]},
    "target behind a link": {"type": "bind", "source": "/etc", "target": "away", "options": ["bind"]},
    "no target": {"type": "bind", "source": "/etc", "target": "no/such", "options": ["bind"]},
    "long options, no lower": {"type": "overlay", "source": "overlay", "options": ["x" * 5000]},
    "long options, odd lowers": {
        "type": "overlay",
        "source": "overlay",
        "options": ["lowerdir=/a:b:" + "/c" * 3000],
    },
    "nul in the options": {"type": "tmpfs", "source": "x", "options": ["a\0b"]},
}


@pytest.mark.parametrize("mount", _ROOTFS.values(), ids=_ROOTFS)
def test_a_root_file_system_that_cannot_be_mounted_is_refused(shim: Any, mount: dict[str, Any]) -> None:
    bundle = shim.write_bundle("rooted", json.dumps({"process": PROCESS}))
    (bundle / "rootfs" / "away").unlink(missing_ok=True)
    (bundle / "rootfs" / "away").symlink_to("/etc")
    with shim.connect() as peer:
        request = task_v3_pb2.CreateTaskRequest(id="rooted", bundle=str(bundle))
        request.rootfs.add(**mount)
        assert peer.ask("Create", request) == 3
    shim.assert_serves()
