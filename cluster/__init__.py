"""Submit a job to a cluster from a light laptop, follow it, look again, cancel it.

    __main__.py     python -m cluster submit|list|status|logs|cancel
    submission.py   what is asked of a cluster: checked, absolute, with a stable id; pure
    package.py      which files of the checkout travel
    ray_jobs.py     the Ray Jobs API of any running Ray cluster

Nothing here imports torch or `jobs`; only `ray_jobs` imports ray, and only once something is sent.
"""
