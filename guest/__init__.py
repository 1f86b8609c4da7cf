"""The software inside the virtual machine, and the builder of its image."""
