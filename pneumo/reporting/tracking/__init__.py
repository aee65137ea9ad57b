"""Weights & Biases: what is sent of a run, built from the run's folder, and the session that sends
it.

No job reads results from W&B. The folder has all that is sent, so it can be sent again. Nothing
that identifies a patient is sent: whoever writes the folder takes care of it.
"""
