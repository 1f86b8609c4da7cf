"""The shim's reports: events, metrics, the log, timelines, and the last words of a sandbox."""
