"""The Ray cluster of a job: the connection to it, its nodes and worker processes."""
