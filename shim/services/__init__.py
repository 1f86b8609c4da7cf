"""The wire services: they only translate requests, replies and errors."""
