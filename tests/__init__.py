"""The tests of Hako."""

from __future__ import annotations

import os

# Before any test imports grpc, and for the reason that shim/transport/grpc_server.py gives.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
