"""The annotations of containers and pods that the shim uses."""

from __future__ import annotations

#: It says which containers share a shim; runc's shim uses it, too.
GROUP = "io.containerd.runc.v2.group"
#: containerd's id of the pod that a container belongs to.
POD = "io.kubernetes.cri.sandbox-id"
#: The pod's name, namespace and uid, and a container's name, as Kubernetes has them.
POD_NAME = "io.kubernetes.cri.sandbox-name"
POD_NAMESPACE = "io.kubernetes.cri.sandbox-namespace"
POD_UID = "io.kubernetes.cri.sandbox-uid"
CONTAINER_NAME = "io.kubernetes.cri.container-name"
#: The kind of a container, from containerd's CRI: ``sandbox`` for the pause container.
KIND = "io.kubernetes.cri.container-type"
