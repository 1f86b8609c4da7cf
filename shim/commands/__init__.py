"""What `hako` does for an operator: a module for each command that is more than a few lines."""
