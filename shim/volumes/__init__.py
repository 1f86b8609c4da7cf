"""A container's volumes: the host's files that the guest sees, once for all containers that use them."""
