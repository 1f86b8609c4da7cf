"""The host's kernel: system calls, processes, mounts, and the ledger of what a sandbox has made there."""
