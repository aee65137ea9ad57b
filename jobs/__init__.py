"""Ray jobs: `python -m jobs.prepare`, train, tune, evaluate, predict, demo, track.

Each entry module checks the command line first, and then imports the code that does the work.
"""
