"""The annotations of containers and pods that mean something to the shim."""

from __future__ import annotations

#: Which containers share a shim; runc's shim has it, too.
GROUP = "io.containerd.runc.v2.group"
#: containerd's id of the pod that a container belongs to.
POD = "io.kubernetes.cri.sandbox-id"
#: What containerd's CRI says of a container: ``sandbox`` of the one that stands for its pod.
KIND = "io.kubernetes.cri.container-type"
