"""The host's kernel: system calls, processes, mounts, and the ledger of a sandbox's objects there."""
