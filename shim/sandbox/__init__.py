"""A sandbox, its containers and their processes, and the files and streams that they have on the host."""
