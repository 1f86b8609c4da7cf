"""The pod's network, given to its machine: each interface of the namespace becomes a network card."""
