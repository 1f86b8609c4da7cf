"""The commands of `hako`: a module for each that needs more than a few lines."""
