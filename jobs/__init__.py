"""The jobs: `python -m jobs.prepare`, train, tune, evaluate, leave_one_out, predict, export, find,
track, demo; and preflight, which `python -m cluster submit` runs before them.

Each entry module checks the command line first, and then imports the code that does the work.
"""
