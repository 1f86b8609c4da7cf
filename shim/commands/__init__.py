"""The commands of `hako`, one module for each."""
