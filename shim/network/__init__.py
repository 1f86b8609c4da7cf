"""Gives the pod's network to its machine: each interface of the namespace becomes a network card."""
