"""The generated messages agree, number by number, with the contracts of containerd and the Kata agent.

The table is a second copy on purpose: a changed number, name or type in a ``.proto`` file must show here,
because the peer would not complain but misread.
"""

from __future__ import annotations

import importlib

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from proto.containerd import task_v2_pb2, task_v3_pb2

PACKAGES = {
    "proto.extensions_pb2": "hako",
    "proto.ttrpc_pb2": "ttrpc",
    "proto.containerd.bootstrap_v1_pb2": "containerd.runtime.bootstrap.v1",
    "proto.containerd.cgroups_v1_pb2": "io.containerd.cgroups.v1",
    "proto.containerd.cgroups_v2_pb2": "io.containerd.cgroups.v2",
    "proto.containerd.events_pb2": "containerd.events",
    "proto.containerd.events_ttrpc_pb2": "containerd.services.events.ttrpc.v1",
    "proto.containerd.runc_options_pb2": "containerd.runc.v1",
    "proto.containerd.runtime_options_pb2": "runtimeoptions.v1",
    "proto.containerd.sandbox_v1_pb2": "containerd.runtime.sandbox.v1",
    "proto.containerd.task_types_pb2": "containerd.v1.types",
    "proto.containerd.task_v2_pb2": "containerd.task.v2",
    "proto.containerd.task_v3_pb2": "containerd.task.v3",
    "proto.containerd.types_pb2": "containerd.types",
    "proto.kata.agent_pb2": "grpc",
    "proto.kata.csi_pb2": "grpc",
    "proto.kata.health_pb2": "grpc",
    "proto.kata.oci_pb2": "grpc",
    "proto.kata.types_pb2": "types",
}

# Notation: "number name type"; [] is repeated, gp. is google.protobuf., opt is explicit presence.
# Types of the message's own package are written without it.
MESSAGES = """
grpc.CreateContainerRequest: 1 container_id string; 2 exec_id string; 3 string_user StringUser; 4 devices
    []Device; 5 storages []Storage; 6 OCI Spec; 7 sandbox_pidns bool; 8 shared_mounts []SharedMount; 9
    stdin_port uint32; 10 stdout_port uint32; 11 stderr_port uint32
grpc.RemoveContainerRequest: 1 container_id string; 2 timeout uint32
grpc.ExecProcessRequest: 1 container_id string; 2 exec_id string; 3 string_user StringUser; 4 process
    Process; 5 stdin_port uint32; 6 stdout_port uint32; 7 stderr_port uint32
grpc.SignalProcessRequest: 1 container_id string; 2 exec_id string; 3 signal uint32
grpc.WaitProcessRequest: 1 container_id string; 2 exec_id string
grpc.WaitProcessResponse: 1 status int32
grpc.UpdateContainerRequest: 1 container_id string; 2 resources LinuxResources
grpc.CpuUsage: 1 total_usage uint64; 2 percpu_usage []uint64; 3 usage_in_kernelmode uint64; 4
    usage_in_usermode uint64
grpc.CpuStats: 1 cpu_usage CpuUsage; 2 throttling_data ThrottlingData
grpc.MemoryData: 1 usage uint64; 2 max_usage uint64; 3 failcnt uint64; 4 limit uint64
grpc.MemoryStats: 1 cache uint64; 2 usage MemoryData; 3 swap_usage MemoryData; 4 kernel_usage MemoryData; 5
    use_hierarchy bool; 6 stats map<string,uint64>
grpc.BlkioStatsEntry: 1 major uint64; 2 minor uint64; 3 op string; 4 value uint64
grpc.BlkioStats: 1 io_service_bytes_recursive []BlkioStatsEntry; 2 io_serviced_recursive []BlkioStatsEntry;
    3 io_queued_recursive []BlkioStatsEntry; 4 io_service_time_recursive []BlkioStatsEntry; 5
    io_wait_time_recursive []BlkioStatsEntry; 6 io_merged_recursive []BlkioStatsEntry; 7 io_time_recursive
    []BlkioStatsEntry; 8 sectors_recursive []BlkioStatsEntry
grpc.CgroupStats: 1 cpu_stats CpuStats; 2 memory_stats MemoryStats; 3 pids_stats PidsStats; 4 blkio_stats
    BlkioStats; 5 hugetlb_stats map<string,HugetlbStats>
grpc.StatsContainerResponse: 1 cgroup_stats CgroupStats; 2 network_stats []NetworkStats
grpc.WriteStreamRequest: 1 container_id string; 2 exec_id string; 3 data bytes
grpc.ReadStreamRequest: 1 container_id string; 2 exec_id string; 3 len uint32
grpc.ReadStreamResponse: 1 data bytes
grpc.TtyWinResizeRequest: 1 container_id string; 2 exec_id string; 3 row uint32; 4 column uint32
grpc.CreateSandboxRequest: 1 hostname string; 2 dns []string; 3 storages []Storage; 4 sandbox_pidns bool; 5
    sandbox_id string; 6 guest_hook_path string; 7 kernel_modules []KernelModule
grpc.Interfaces: 1 Interfaces []types.Interface
grpc.Routes: 1 Routes []types.Route; 1001 refused []string
grpc.ARPNeighbors: 1 ARPNeighbors []types.ARPNeighbor
grpc.OnlineCPUMemRequest: 1 wait bool; 2 nb_cpus uint32; 3 cpu_only bool
grpc.ReseedRandomDevRequest: 2 data bytes
grpc.AgentDetails: 1 version string; 2 init_daemon bool; 3 device_handlers []string; 4 storage_handlers
    []string; 5 supports_seccomp bool; 6 extra_features []string
grpc.GuestDetailsResponse: 1 mem_block_size_bytes uint64; 2 agent_details AgentDetails; 3
    support_mem_hotplug_probe bool
grpc.MemHotplugByProbeRequest: 1 memHotplugProbeAddr []uint64
grpc.SetGuestDateTimeRequest: 1 Sec int64; 2 Usec int64
grpc.FSGroup: 2 group_id uint32; 3 group_change_policy types.FSGroupChangePolicy
grpc.SharedMount: 1 name string; 2 src_ctr string; 3 src_path string; 4 dst_ctr string; 5 dst_path string
grpc.Storage: 1 driver string; 2 driver_options []string; 3 source string; 4 fstype string; 5 options
    []string; 6 mount_point string; 7 fs_group FSGroup; 8 shared bool
grpc.Device: 1 id string; 2 type string; 3 vm_path string; 4 container_path string; 5 options []string
grpc.StringUser: 1 uid string; 2 gid string; 3 additionalGids []string
grpc.CopyFileRequest: 1 path string; 2 file_size int64; 3 file_mode uint32; 4 dir_mode uint32; 5 uid int32;
    6 gid int32; 7 offset int64; 8 data bytes
grpc.OOMEvent: 1 container_id string
grpc.AddSwapRequest: 1 PCIPath []uint32
grpc.MemAgentMemcgConfig: 1 disabled opt bool; 2 swap opt bool; 3 swappiness_max opt uint32; 4 period_secs
    opt uint64; 5 period_psi_percent_limit opt uint32; 6 eviction_psi_percent_limit opt uint32; 7
    eviction_run_aging_count_min opt uint64
grpc.MemAgentCompactConfig: 1 disabled opt bool; 2 period_secs opt uint64; 3 period_psi_percent_limit opt
    uint32; 4 compact_psi_percent_limit opt uint32; 5 compact_sec_max opt int64; 6 compact_order opt uint32;
    7 compact_threshold opt uint64; 8 compact_force_times opt uint64
grpc.Spec: 1 Version string; 2 Process Process; 3 Root Root; 4 Hostname string; 5 Mounts []Mount; 6 Hooks
    Hooks; 7 Annotations map<string,string>; 8 Linux Linux; 9 Solaris Solaris; 10 Windows Windows
grpc.Process: 1 Terminal bool; 2 ConsoleSize Box; 3 User User; 4 Args []string; 5 Env []string; 6 Cwd
    string; 7 Capabilities LinuxCapabilities; 8 Rlimits []POSIXRlimit; 9 NoNewPrivileges bool; 10
    ApparmorProfile string; 11 OOMScoreAdj int64; 12 SelinuxLabel string
grpc.User: 1 UID uint32; 2 GID uint32; 3 AdditionalGids []uint32; 4 Username string
grpc.LinuxCapabilities: 1 Bounding []string; 2 Effective []string; 3 Inheritable []string; 4 Permitted
    []string; 5 Ambient []string
grpc.POSIXRlimit: 1 Type string; 2 Hard uint64; 3 Soft uint64
grpc.Mount: 1 destination string; 2 source string; 3 type string; 4 options []string
grpc.Root: 1 Path string; 2 Readonly bool
grpc.Hooks: 1 Prestart []Hook; 2 Poststart []Hook; 3 Poststop []Hook; 4 CreateRuntime []Hook; 5
    CreateContainer []Hook; 6 StartContainer []Hook
grpc.Hook: 1 Path string; 2 Args []string; 3 Env []string; 4 Timeout int64
grpc.Linux: 1 UIDMappings []LinuxIDMapping; 2 GIDMappings []LinuxIDMapping; 3 Sysctl map<string,string>; 4
    Resources LinuxResources; 5 CgroupsPath string; 6 Namespaces []LinuxNamespace; 7 Devices []LinuxDevice;
    8 Seccomp LinuxSeccomp; 9 RootfsPropagation string; 10 MaskedPaths []string; 11 ReadonlyPaths []string;
    12 MountLabel string; 13 IntelRdt LinuxIntelRdt
grpc.LinuxNamespace: 1 Type string; 2 Path string
grpc.LinuxDevice: 1 Path string; 2 Type string; 3 Major int64; 4 Minor int64; 5 FileMode uint32; 6 UID
    uint32; 7 GID uint32
grpc.LinuxResources: 1 Devices []LinuxDeviceCgroup; 2 Memory LinuxMemory; 3 CPU LinuxCPU; 4 Pids LinuxPids;
    5 BlockIO LinuxBlockIO; 6 HugepageLimits []LinuxHugepageLimit; 7 Network LinuxNetwork
grpc.LinuxMemory: 1 Limit int64; 2 Reservation int64; 3 Swap int64; 4 Kernel int64; 5 KernelTCP int64; 6
    Swappiness uint64; 7 DisableOOMKiller bool
grpc.LinuxCPU: 1 Shares uint64; 2 Quota int64; 3 Period uint64; 4 RealtimeRuntime int64; 5 RealtimePeriod
    uint64; 6 Cpus string; 7 Mems string
grpc.LinuxPids: 1 Limit int64
grpc.LinuxDeviceCgroup: 1 Allow bool; 2 Type string; 3 Major int64; 4 Minor int64; 5 Access string
grpc.LinuxHugepageLimit: 1 Pagesize string; 2 Limit uint64
grpc.LinuxSeccomp: 1 DefaultAction string; 2 Architectures []string; 3 Flags []string; 4 Syscalls
    []LinuxSyscall
grpc.LinuxSeccompArg: 1 Index uint64; 2 Value uint64; 3 ValueTwo uint64; 4 Op string
grpc.LinuxSyscall: 1 Names []string; 2 Action string; 3 errnoret uint32 oneof ErrnoRet; 4 Args
    []LinuxSeccompArg
grpc.VolumeUsage: 1 available uint64; 2 total uint64; 3 used uint64; 4 unit Unit
grpc.VersionCheckResponse: 1 grpc_version string; 2 agent_version string
types.IPAddress: 1 family IPFamily; 2 address string; 3 mask string; 1001 details hako.AddressDetails
hako.AddressDetails: 1 prefix uint32; 2 peer string; 3 broadcast string; 4 label string; 5 scope uint32;
  6 flags uint32; 7 metric uint32; 8 deprecated bool
hako.Rule: 1 body bytes; 2 text string
hako.Rules: 1 rules []Rule
hako.Settings: 1 values map<string,string>
grpc.UpdateRoutesRequest: 1 routes Routes; 1001 rules hako.Rules; 1002 settings hako.Settings
grpc.AddARPNeighborsRequest: 1 neighbors ARPNeighbors; 1001 complete bool
types.Interface: 1 device string; 2 name string; 3 IPAddresses []IPAddress; 4 mtu uint64; 5 hwAddr string; 6
    devicePath string; 7 type string; 8 raw_flags uint32
types.Route: 1 dest string; 2 gateway string; 3 device string; 4 source string; 5 scope uint32; 6 family
    IPFamily; 7 flags uint32; 8 mtu uint32; 1001 metric uint32; 1002 next_hops []hako.NextHop; 1003 type
    uint32; 1004 table uint32; 1005 tos uint32; 1006 protocol uint32; 1007 senders string; 1008 attributes
    bytes
hako.NextHop: 1 gateway string; 2 device string; 3 weight uint32; 4 flags uint32
types.ARPNeighbor: 1 toIPAddress IPAddress; 2 device string; 3 lladdr string; 4 state int32; 5 flags int32
containerd.task.v2.CreateTaskRequest: 1 id string; 2 bundle string; 3 rootfs []containerd.types.Mount; 4
    terminal bool; 5 stdin string; 6 stdout string; 7 stderr string; 8 checkpoint string; 9
    parent_checkpoint string; 10 options gp.Any
containerd.task.v2.DeleteResponse: 1 pid uint32; 2 exit_status uint32; 3 exited_at gp.Timestamp
containerd.task.v2.ExecProcessRequest: 1 id string; 2 exec_id string; 3 terminal bool; 4 stdin string; 5
    stdout string; 6 stderr string; 7 spec gp.Any
containerd.task.v2.ExecProcessResponse: (empty)
containerd.task.v2.ResizePtyRequest: 1 id string; 2 exec_id string; 3 width uint32; 4 height uint32
containerd.task.v2.StateResponse: 1 id string; 2 bundle string; 3 pid uint32; 4 status
    containerd.v1.types.Status; 5 stdin string; 6 stdout string; 7 stderr string; 8 terminal bool; 9
    exit_status uint32; 10 exited_at gp.Timestamp; 11 exec_id string
containerd.task.v2.KillRequest: 1 id string; 2 exec_id string; 3 signal uint32; 4 all bool
containerd.task.v2.CloseIORequest: 1 id string; 2 exec_id string; 3 stdin bool
containerd.task.v2.UpdateTaskRequest: 1 id string; 2 resources gp.Any; 3 annotations map<string,string>
containerd.task.v2.WaitResponse: 1 exit_status uint32; 2 exited_at gp.Timestamp
containerd.task.v2.StatsResponse: 1 stats gp.Any
containerd.task.v2.ConnectResponse: 1 shim_pid uint32; 2 task_pid uint32; 3 version string
containerd.task.v2.ShutdownRequest: 1 id string; 2 now bool
containerd.runtime.sandbox.v1.CreateSandboxRequest: 1 sandbox_id string; 2 bundle_path string; 3 rootfs
    []containerd.types.Mount; 4 options gp.Any; 5 netns_path string; 6 annotations map<string,string>
containerd.runtime.sandbox.v1.StartSandboxResponse: 1 pid uint32; 2 created_at gp.Timestamp; 3 spec gp.Any
containerd.runtime.sandbox.v1.PlatformResponse: 1 platform containerd.types.Platform
containerd.runtime.sandbox.v1.StopSandboxRequest: 1 sandbox_id string; 2 timeout_secs uint32
containerd.runtime.sandbox.v1.WaitSandboxResponse: 1 exit_status uint32; 2 exited_at gp.Timestamp
containerd.runtime.sandbox.v1.SandboxStatusResponse: 1 sandbox_id string; 2 pid uint32; 3 state string; 4
    info map<string,string>; 5 created_at gp.Timestamp; 6 exited_at gp.Timestamp; 7 extra gp.Any
containerd.runtime.sandbox.v1.SandboxMetricsResponse: 1 metrics containerd.types.Metric
containerd.runtime.bootstrap.v1.BootstrapParams: 1 instance_id string; 2 namespace string; 3 log_level
    LogLevel; 4 containerd_version string; 5 containerd_ttrpc_address string; 6 containerd_grpc_address
    string; 7 containerd_binary string; 8 extensions []Extension; 9 socket_dir opt string
containerd.runtime.bootstrap.v1.Extension: 1 value gp.Any
containerd.runtime.bootstrap.v1.BootstrapResult: 1 version int32; 2 address string; 3 protocol string; 4
    capabilities []Capability; 5 metadata map<string,string>
containerd.services.events.ttrpc.v1.ForwardRequest: 1 envelope Envelope
containerd.services.events.ttrpc.v1.Envelope: 1 timestamp gp.Timestamp; 2 namespace string; 3 topic string;
    4 event gp.Any
containerd.events.TaskCreate: 1 container_id string; 2 bundle string; 3 rootfs []containerd.types.Mount; 4
    io TaskIO; 5 checkpoint string; 6 pid uint32
containerd.events.TaskStart: 1 container_id string; 2 pid uint32
containerd.events.TaskDelete: 1 container_id string; 2 pid uint32; 3 exit_status uint32; 4 exited_at
    gp.Timestamp; 5 id string
containerd.events.TaskIO: 1 stdin string; 2 stdout string; 3 stderr string; 4 terminal bool
containerd.events.TaskExit: 1 container_id string; 2 id string; 3 pid uint32; 4 exit_status uint32; 5
    exited_at gp.Timestamp
containerd.events.TaskExecAdded: 1 container_id string; 2 exec_id string
containerd.events.TaskExecStarted: 1 container_id string; 2 exec_id string; 3 pid uint32
containerd.events.TaskCheckpointed: 1 container_id string; 2 checkpoint string
io.containerd.cgroups.v1.Metrics: 1 hugetlb []HugetlbStat; 2 pids PidsStat; 3 cpu CPUStat; 4 memory
    MemoryStat; 5 blkio BlkIOStat; 6 rdma RdmaStat; 7 network []NetworkStat; 8 cgroup_stats CgroupStats; 9
    memory_oom_control MemoryOomControl
io.containerd.cgroups.v1.CPUUsage: 1 total uint64; 2 kernel uint64; 3 user uint64; 4 per_cpu []uint64
io.containerd.cgroups.v1.MemoryStat: 1 cache uint64; 2 rss uint64; 3 rss_huge uint64; 4 mapped_file uint64;
    5 dirty uint64; 6 writeback uint64; 7 pg_pg_in uint64; 8 pg_pg_out uint64; 9 pg_fault uint64; 10
    pg_maj_fault uint64; 11 inactive_anon uint64; 12 active_anon uint64; 13 inactive_file uint64; 14
    active_file uint64; 15 unevictable uint64; 16 hierarchical_memory_limit uint64; 17
    hierarchical_swap_limit uint64; 18 total_cache uint64; 19 total_rss uint64; 20 total_rss_huge uint64; 21
    total_mapped_file uint64; 22 total_dirty uint64; 23 total_writeback uint64; 24 total_pg_pg_in uint64; 25
    total_pg_pg_out uint64; 26 total_pg_fault uint64; 27 total_pg_maj_fault uint64; 28 total_inactive_anon
    uint64; 29 total_active_anon uint64; 30 total_inactive_file uint64; 31 total_active_file uint64; 32
    total_unevictable uint64; 33 usage MemoryEntry; 34 swap MemoryEntry; 35 kernel MemoryEntry; 36
    kernel_tcp MemoryEntry
io.containerd.cgroups.v1.MemoryEntry: 1 limit uint64; 2 usage uint64; 3 max uint64; 4 failcnt uint64
io.containerd.cgroups.v1.MemoryOomControl: 1 oom_kill_disable uint64; 2 under_oom uint64; 3 oom_kill uint64
io.containerd.cgroups.v1.BlkIOEntry: 1 op string; 2 device string; 3 major uint64; 4 minor uint64; 5 value
    uint64
io.containerd.cgroups.v2.Metrics: 1 pids PidsStat; 2 cpu CPUStat; 4 memory MemoryStat; 5 rdma RdmaStat; 6 io
    IOStat; 7 hugetlb []HugeTlbStat; 8 memory_events MemoryEvents; 9 network []NetworkStat
io.containerd.cgroups.v2.CPUStat: 1 usage_usec uint64; 2 user_usec uint64; 3 system_usec uint64; 4
    nr_periods uint64; 5 nr_throttled uint64; 6 throttled_usec uint64; 7 psi PSIStats; 8 nr_bursts uint64; 9
    burst_usec uint64
io.containerd.cgroups.v2.MemoryStat: 1 anon uint64; 2 file uint64; 3 kernel_stack uint64; 4 slab uint64; 5
    sock uint64; 6 shmem uint64; 7 file_mapped uint64; 8 file_dirty uint64; 9 file_writeback uint64; 10
    anon_thp uint64; 11 inactive_anon uint64; 12 active_anon uint64; 13 inactive_file uint64; 14 active_file
    uint64; 15 unevictable uint64; 16 slab_reclaimable uint64; 17 slab_unreclaimable uint64; 18 pgfault
    uint64; 19 pgmajfault uint64; 20 workingset_refault uint64; 21 workingset_activate uint64; 22
    workingset_nodereclaim uint64; 23 pgrefill uint64; 24 pgscan uint64; 25 pgsteal uint64; 26 pgactivate
    uint64; 27 pgdeactivate uint64; 28 pglazyfree uint64; 29 pglazyfreed uint64; 30 thp_fault_alloc uint64;
    31 thp_collapse_alloc uint64; 32 usage uint64; 33 usage_limit uint64; 34 swap_usage uint64; 35
    swap_limit uint64; 36 max_usage uint64; 37 swap_max_usage uint64; 38 psi PSIStats; 39
    workingset_refault_anon uint64; 40 workingset_refault_file uint64; 41 workingset_activate_anon uint64;
    42 workingset_activate_file uint64
io.containerd.cgroups.v2.MemoryEvents: 1 low uint64; 2 high uint64; 3 max uint64; 4 oom uint64; 5 oom_kill
    uint64; 6 oom_group_kill uint64
io.containerd.cgroups.v2.IOEntry: 1 major uint64; 2 minor uint64; 3 rbytes uint64; 4 wbytes uint64; 5 rios
    uint64; 6 wios uint64
io.containerd.cgroups.v2.HugeTlbStat: 1 current uint64; 2 max uint64; 3 pagesize string; 4 failcnt uint64
containerd.types.Mount: 1 type string; 2 source string; 3 target string; 4 options []string
containerd.types.Platform: 1 os string; 2 architecture string; 3 variant string; 4 os_version string; 5
    os_features []string
containerd.types.Metric: 1 timestamp gp.Timestamp; 2 id string; 3 data gp.Any
containerd.types.RuntimeInfo: 1 name string; 2 version RuntimeVersion; 3 options gp.Any; 4 features gp.Any;
    5 annotations map<string,string>
containerd.v1.types.ProcessInfo: 1 pid uint32; 2 info gp.Any
runtimeoptions.v1.Options: 1 type_url string; 2 config_path string; 3 config_body bytes
containerd.runc.v1.Options: 1 no_pivot_root bool; 2 no_new_keyring bool; 3 shim_cgroup string; 4 io_uid
    uint32; 5 io_gid uint32; 6 binary_name string; 7 root string; 8 criu_path string; 9 systemd_cgroup bool;
    10 criu_image_path string; 11 criu_work_path string; 12 task_api_address string; 13 task_api_version
    uint32
ttrpc.Request: 1 service string; 2 method string; 3 payload bytes; 4 timeout_nano int64; 5 metadata
    []KeyValue
ttrpc.Response: 1 status Status; 2 payload bytes
ttrpc.KeyValue: 1 key string; 2 value string
ttrpc.Status: 1 code int32; 2 message string; 3 details []gp.Any
"""

Fields = dict[int, tuple[str, str, str]]
Field = descriptor_pb2.FieldDescriptorProto
POOL = descriptor_pool.Default()
for _module in PACKAGES:
    importlib.import_module(_module)


def sections(table: str) -> dict[str, str]:
    """Split a table at its unindented lines; each begins with a name and a colon."""
    found: dict[str, str] = {}
    name = ""
    for line in table.strip().splitlines():
        if line.startswith(" "):
            found[name] += "\n" + line.strip()
        else:
            name, _, rest = line.partition(":")
            assert name not in found
            found[name] = rest.strip()
    return found


def expected_fields(text: str) -> Fields:
    """Read "number name type" entries into {number: (name, type, label)}."""
    fields: Fields = {}
    for entry in text.replace("\n", " ").split("; "):
        if entry == "(empty)":
            continue
        number, name, kind = entry.split(" ", 2)
        label = "one"
        if kind.startswith("[]"):
            label, kind = "repeated", kind.removeprefix("[]")
        elif kind.startswith("opt "):
            label, kind = "optional", kind.removeprefix("opt ")
        elif kind.startswith("map<"):
            label = "map"
        elif " oneof " in kind:
            kind, _, label = kind.partition(" ")
        fields[int(number)] = (name, kind, label)
    return fields


def short_type(field: Field, package: str) -> str:
    """Name a field's type as the tables do."""
    if not field.type_name:
        return Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = field.type_name.removeprefix(".")
    if name.startswith("google.protobuf."):
        return name.replace("google.protobuf.", "gp.")
    # An enum inside a message is written without the message's name.
    return name.removeprefix(package + ".").rpartition(".")[2] if name.startswith(package + ".") else name


def actual_fields(full_name: str) -> Fields:
    """Render a generated message as {number: (name, type, label)}."""
    descriptor = POOL.FindMessageTypeByName(full_name)
    package = descriptor.file.package
    message = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(message)
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    fields: Fields = {}
    for field in message.field:
        kind, label = short_type(field, package), "one"
        if kind in entries:
            key, value = (short_type(part, package) for part in entries[kind].field)
            kind, label = f"map<{key},{value}>", "map"
        elif field.label == Field.LABEL_REPEATED:
            label = "repeated"
        elif field.proto3_optional:
            label = "optional"
        elif field.HasField("oneof_index"):
            label = f"oneof {message.oneof_decl[field.oneof_index].name}"
        fields[field.number] = (field.name, kind, label)
    return fields


TABLES = sections(MESSAGES)


@pytest.mark.parametrize(("module", "package"), PACKAGES.items())
def test_a_file_has_the_package_and_syntax_of_the_wire(module: str, package: str) -> None:
    file = descriptor_pb2.FileDescriptorProto()
    importlib.import_module(module).DESCRIPTOR.CopyToProto(file)
    assert (file.package, file.syntax) == (package, "proto3")


@pytest.mark.parametrize(("full_name", "table"), TABLES.items(), ids=TABLES)
def test_a_message_has_the_fields_of_the_contract(full_name: str, table: str) -> None:
    assert actual_fields(full_name) == expected_fields(table)


def test_task_v3_has_the_same_messages_as_task_v2() -> None:
    names = set(task_v2_pb2.DESCRIPTOR.message_types_by_name)
    assert set(task_v3_pb2.DESCRIPTOR.message_types_by_name) == names
    for name in names:
        assert actual_fields(f"containerd.task.v3.{name}") == actual_fields(f"containerd.task.v2.{name}"), (
            name
        )
