"""Submit a job to a cluster from a light laptop, follow it, look again, cancel it.

    __main__.py    python -m cluster submit|list|status|logs|cancel|down
    submission.py  what is asked of a cluster: checked, absolute, with a stable id; pure
    targets.py     what can be asked of any cluster, and how a job is doing
    run_folder.py  what lies where a run writes: its settings, its progress, its logs
    live_view.py   all runs of one person, as a table until they have ended
    ray/           the Ray Jobs API of any running Ray cluster, and the code that is sent to it
    kuberay/       a run as a KubeRay RayJob: rendered, submitted, followed, its problems in words

Nothing here imports torch or `jobs`; ray and kubernetes are imported once something is sent.
"""
