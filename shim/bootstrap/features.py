"""The features of containers that ``-info`` lists: the specification's ``features`` object."""

from __future__ import annotations

#: Only features that crun supports in the guest. Id-mapped mounts have no effect in a virtual machine.
#: Kubernetes looks for ``rro`` among the mount options, and for ``user`` and ``idmap`` before it lets a pod
#: have a user namespace.
FEATURES = (
    '{"ociVersionMin":"1.0.0","ociVersionMax":"1.1.0",'
    '"mountOptions":['
    '"async","atime","bind","defaults","dev","diratime","dirsync","exec","noatime","nodev",'
    '"nodiratime","noexec","norelatime","nostrictatime","nosuid","private","rbind","rdev",'
    '"relatime","remount","rexec","rnodev","rnoexec","rnosuid","ro","rprivate","rro","rrw",'
    '"rslave","rsuid","rw","slave","strictatime","suid","sync"'
    "],"
    '"linux":{'
    '"namespaces":["cgroup","ipc","mount","network","pid","user","uts"],'
    '"cgroup":{"v1":false,"v2":true,"systemd":false,"systemdUser":false,"rdma":false},'
    '"seccomp":{"enabled":true},"apparmor":{"enabled":false},"selinux":{"enabled":false},'
    '"intelRdt":{"enabled":false},'
    '"mountExtensions":{"idmap":{"enabled":false}}}}'
)
