"""A sandbox's virtual machine as the shim sees it: its size, its template, and its host."""
