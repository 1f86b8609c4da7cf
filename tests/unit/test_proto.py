"""Services, enums and sample encodings agree with the contracts of containerd and the Kata agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf import any_pb2, descriptor_pool, timestamp_pb2

from proto import ttrpc_pb2
from proto.containerd import (
    bootstrap_v1_pb2,
    events_pb2,
    events_ttrpc_pb2,
    sandbox_v1_pb2,
    task_v2_pb2,
    task_v3_pb2,
)
from proto.kata import agent_pb2, health_pb2, oci_pb2

if TYPE_CHECKING:
    from typing import Any


FILES = (agent_pb2, health_pb2, task_v2_pb2, task_v3_pb2, sandbox_v1_pb2, events_ttrpc_pb2)

# Notation: "method request response"; gp. is google.protobuf.
TASK = """
    State StateRequest StateResponse
    Create CreateTaskRequest CreateTaskResponse
    Start StartRequest StartResponse
    Delete DeleteRequest DeleteResponse
    Pids PidsRequest PidsResponse
    Pause PauseRequest gp.Empty
    Resume ResumeRequest gp.Empty
    Checkpoint CheckpointTaskRequest gp.Empty
    Kill KillRequest gp.Empty
    Exec ExecProcessRequest gp.Empty
    ResizePty ResizePtyRequest gp.Empty
    CloseIO CloseIORequest gp.Empty
    Update UpdateTaskRequest gp.Empty
    Wait WaitRequest WaitResponse
    Stats StatsRequest StatsResponse
    Connect ConnectRequest ConnectResponse
    Shutdown ShutdownRequest gp.Empty
"""

SERVICES = {
    "grpc.AgentService": """
        CreateContainer CreateContainerRequest gp.Empty
        StartContainer StartContainerRequest gp.Empty
        RemoveContainer RemoveContainerRequest gp.Empty
        ExecProcess ExecProcessRequest gp.Empty
        SignalProcess SignalProcessRequest gp.Empty
        WaitProcess WaitProcessRequest WaitProcessResponse
        UpdateContainer UpdateContainerRequest gp.Empty
        UpdateEphemeralMounts UpdateEphemeralMountsRequest gp.Empty
        StatsContainer StatsContainerRequest StatsContainerResponse
        PauseContainer PauseContainerRequest gp.Empty
        ResumeContainer ResumeContainerRequest gp.Empty
        RemoveStaleVirtiofsShareMounts RemoveStaleVirtiofsShareMountsRequest gp.Empty
        GetDiagnosticData GetDiagnosticDataRequest GetDiagnosticDataResponse
        WriteStdin WriteStreamRequest WriteStreamResponse
        ReadStdout ReadStreamRequest ReadStreamResponse
        ReadStderr ReadStreamRequest ReadStreamResponse
        CloseStdin CloseStdinRequest gp.Empty
        TtyWinResize TtyWinResizeRequest gp.Empty
        UpdateInterface UpdateInterfaceRequest types.Interface
        UpdateRoutes UpdateRoutesRequest Routes
        ListInterfaces ListInterfacesRequest Interfaces
        ListRoutes ListRoutesRequest Routes
        AddARPNeighbors AddARPNeighborsRequest gp.Empty
        GetIPTables GetIPTablesRequest GetIPTablesResponse
        SetIPTables SetIPTablesRequest SetIPTablesResponse
        GetMetrics GetMetricsRequest Metrics
        MemAgentMemcgSet MemAgentMemcgConfig gp.Empty
        MemAgentCompactSet MemAgentCompactConfig gp.Empty
        CreateSandbox CreateSandboxRequest gp.Empty
        DestroySandbox DestroySandboxRequest gp.Empty
        OnlineCPUMem OnlineCPUMemRequest gp.Empty
        ReseedRandomDev ReseedRandomDevRequest gp.Empty
        GetGuestDetails GuestDetailsRequest GuestDetailsResponse
        MemHotplugByProbe MemHotplugByProbeRequest gp.Empty
        SetGuestDateTime SetGuestDateTimeRequest gp.Empty
        CopyFile CopyFileRequest gp.Empty
        GetOOMEvent GetOOMEventRequest OOMEvent
        AddSwap AddSwapRequest gp.Empty
        AddSwapPath AddSwapPathRequest gp.Empty
        GetVolumeStats VolumeStatsRequest VolumeStatsResponse
        ResizeVolume ResizeVolumeRequest gp.Empty
        SetPolicy SetPolicyRequest gp.Empty
    """,
    "grpc.Health": """
        Check CheckRequest HealthCheckResponse
        Version CheckRequest VersionCheckResponse
    """,
    "containerd.task.v2.Task": TASK,
    "containerd.task.v3.Task": TASK,
    "containerd.runtime.sandbox.v1.Sandbox": """
        CreateSandbox CreateSandboxRequest CreateSandboxResponse
        StartSandbox StartSandboxRequest StartSandboxResponse
        Platform PlatformRequest PlatformResponse
        StopSandbox StopSandboxRequest StopSandboxResponse
        WaitSandbox WaitSandboxRequest WaitSandboxResponse
        SandboxStatus SandboxStatusRequest SandboxStatusResponse
        PingSandbox PingRequest PingResponse
        ShutdownSandbox ShutdownSandboxRequest ShutdownSandboxResponse
        SandboxMetrics SandboxMetricsRequest SandboxMetricsResponse
    """,
    "containerd.services.events.ttrpc.v1.Events": """
        Forward ForwardRequest gp.Empty
    """,
}

ENUMS = {
    "containerd.runtime.bootstrap.v1.LogLevel": {
        "LOG_LEVEL_TRACE": -8,
        "LOG_LEVEL_DEBUG": -4,
        "LOG_LEVEL_INFO": 0,
        "LOG_LEVEL_WARN": 4,
        "LOG_LEVEL_ERROR": 8,
        "LOG_LEVEL_FATAL": 10,
        "LOG_LEVEL_PANIC": 12,
    },
    "containerd.runtime.bootstrap.v1.Capability": {"CAPABILITY_UNSPECIFIED": 0},
    "containerd.v1.types.Status": {
        "UNKNOWN": 0,
        "CREATED": 1,
        "RUNNING": 2,
        "STOPPED": 3,
        "PAUSED": 4,
        "PAUSING": 5,
    },
    "grpc.HealthCheckResponse.ServingStatus": {"UNKNOWN": 0, "SERVING": 1, "NOT_SERVING": 2},
    "grpc.VolumeUsage.Unit": {"UNKNOWN": 0, "BYTES": 1, "INODES": 2},
    "types.IPFamily": {"v4": 0, "v6": 1},
    "types.FSGroupChangePolicy": {"Always": 0, "OnRootMismatch": 1},
}


@pytest.mark.parametrize(("full_name", "table"), SERVICES.items(), ids=SERVICES)
def test_a_service_has_the_methods_of_the_contract(full_name: str, table: str) -> None:
    service = descriptor_pool.Default().FindServiceByName(full_name)

    def short(name: str) -> str:
        return name.replace("google.protobuf.", "gp.").removeprefix(service.file.package + ".")

    methods = [
        (method.name, short(method.input_type.full_name), short(method.output_type.full_name))
        for method in service.methods
    ]
    assert methods == [tuple(line.split()) for line in table.strip().splitlines()]
    assert not any(method.client_streaming or method.server_streaming for method in service.methods)


def test_no_file_has_another_service() -> None:
    assert {
        service.full_name for file in FILES for service in file.DESCRIPTOR.services_by_name.values()
    } == set(SERVICES)


@pytest.mark.parametrize(("full_name", "values"), ENUMS.items(), ids=ENUMS)
def test_an_enum_has_the_values_of_the_contract(full_name: str, values: dict[str, int]) -> None:
    enum = descriptor_pool.Default().FindEnumTypeByName(full_name)
    assert {value.name: value.number for value in enum.values} == values


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        pytest.param(
            bootstrap_v1_pb2.BootstrapParams(log_level=bootstrap_v1_pb2.LOG_LEVEL_TRACE),
            b"\x18\xf8" + b"\xff" * 8 + b"\x01",
            id="a negative log level takes ten bytes",
        ),
        pytest.param(
            bootstrap_v1_pb2.BootstrapParams(socket_dir=""),
            b"\x4a\x00",
            id="an empty socket_dir is still given",
        ),
        pytest.param(oci_pb2.LinuxSyscall(errnoret=0), b"\x18\x00", id="errno 0 differs from no errno"),
        pytest.param(
            agent_pb2.MemAgentMemcgConfig(disabled=False), b"\x08\x00", id="an optional false is still given"
        ),
        pytest.param(agent_pb2.ReseedRandomDevRequest(data=b"r"), b"\x12\x01r", id="entropy is field 2"),
        pytest.param(agent_pb2.FSGroup(group_id=1), b"\x10\x01", id="a volume's group is field 2"),
        pytest.param(
            agent_pb2.AddSwapRequest(PCIPath=[2, 1]), b"\x0a\x02\x02\x01", id="repeated numbers are packed"
        ),
        pytest.param(
            agent_pb2.CreateContainerRequest(
                OCI=oci_pb2.Spec(Linux=oci_pb2.Linux(Resources=oci_pb2.LinuxResources()))
            ),
            b"\x32\x04\x42\x02\x22\x00",
            id="an empty sub-message is present",
        ),
        pytest.param(
            events_pb2.TaskExit(
                container_id="c",
                id="c",
                pid=300,
                exit_status=137,
                exited_at=timestamp_pb2.Timestamp(seconds=1),
            ),
            b"\x0a\x01c\x12\x01c\x18\xac\x02\x20\x89\x01\x2a\x02\x08\x01",
            id="an exit event",
        ),
        pytest.param(
            ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=5, message="m")),
            b"\x0a\x05\x08\x05\x12\x01m",
            id="a failed response",
        ),
    ],
)
def test_a_message_has_the_bytes_of_the_contract(message: Any, encoded: bytes) -> None:
    assert message.SerializeToString() == encoded
    assert type(message).FromString(encoded) == message


def test_parsing_cannot_tell_bootstrap_parameters_from_a_bare_any() -> None:
    options = any_pb2.Any(type_url="runtimeoptions.v1.Options", value=b"v")
    misread = bootstrap_v1_pb2.BootstrapParams.FromString(options.SerializeToString())
    assert misread.instance_id == options.type_url
