"""Hako's runtime shim, which containerd calls."""
