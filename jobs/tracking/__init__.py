"""Send a run's folder to W&B, in a process of its own."""
