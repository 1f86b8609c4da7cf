"""What containerd executes: ``start``, ``delete`` and its questions, with the standard library only."""
