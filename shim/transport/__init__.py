"""ttrpc and gRPC over one dispatch table; a service method is independent of both."""
