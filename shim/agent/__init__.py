"""How the shim speaks to the guest: the agent's client, and the OCI specification as messages."""
