"""What containerd talks to: the runtime shim of Hako."""
