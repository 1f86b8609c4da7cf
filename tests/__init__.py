"""The tests of Hako."""

from __future__ import annotations

import os

# Must come before any test imports grpc; shim/transport/grpc_server.py gives the reason.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
