"""Ray jobs, run inside the cluster: `python -m jobs.prepare`, train, tune, evaluate, predict, demo.

These entry modules check the command line and import what does the work afterwards.
"""
