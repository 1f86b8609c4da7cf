"""A container's volumes: the host's files that the guest sees, shared once for all containers."""
