"""The terminal side of a job: entry point, checks of its arguments, progress, and the kept log."""
