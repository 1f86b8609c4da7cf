"""The shim's reports: events, metrics, the log, timelines, and the last output of a sandbox."""
