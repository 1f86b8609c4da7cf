"""The wire services: translation of requests, replies and errors, nothing else."""
