"""The program that containerd executes: ``start``, ``delete`` and queries, with the standard library only."""
