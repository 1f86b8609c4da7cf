"""The runtime shim of Hako, which containerd calls."""
