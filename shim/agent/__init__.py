"""The shim's words to the guest: the agent's client, and the OCI specification as its messages."""
