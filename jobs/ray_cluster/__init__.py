"""The Ray cluster that a job runs on, its nodes and worker processes."""
