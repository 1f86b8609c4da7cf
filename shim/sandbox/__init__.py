"""A sandbox, its containers and their processes, and their files and streams on the host."""
