"""Ray jobs: `python -m jobs.prepare`, train, tune, evaluate, predict, demo, track.

These entry modules check the command line and import what does the work afterwards.
"""
