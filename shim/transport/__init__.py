"""ttrpc and gRPC over one dispatch table; a service method knows neither."""
