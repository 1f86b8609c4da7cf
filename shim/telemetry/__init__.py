"""What others are told: events, metrics, the log, timelines, and the last words of a sandbox."""
