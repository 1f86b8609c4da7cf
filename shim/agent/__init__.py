"""What is said to the guest: the agent's client, and the OCI specification as its messages."""
