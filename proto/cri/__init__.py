"""The part of the Kubernetes container runtime interface that reaches a shim."""
