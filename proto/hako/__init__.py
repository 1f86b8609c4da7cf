"""What operators' tools ask a shim."""
