"""Submit jobs to a cluster from a laptop; follow, list and cancel them.

    __main__.py    python -m cluster submit|list|status|logs|cancel|down
    submission.py  a job to submit: checked settings, absolute paths, a stable id; pure
    targets.py     the interface of both kinds of cluster, a job's state, remote addresses
    run_folder.py  reads a run's folder: its settings, progress and logs
    live_view.py   a live table of one user's runs
    ray/           the Ray Jobs API of a running Ray cluster, and the code that is sent to it
    kuberay/       a run as a KubeRay RayJob: rendered, submitted, followed, its problems explained

Nothing here imports torch or `jobs`; ray and kubernetes are imported only to contact a cluster.
"""
