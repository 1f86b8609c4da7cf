"""A container's volumes: what the guest is shown of the host's files, once for all that use it."""
