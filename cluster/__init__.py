"""Submit a job to a cluster from a light laptop, follow it, look again, cancel it.

    __main__.py          python -m cluster submit|list|status|logs|cancel|down
    submission.py        what is asked of a cluster: checked, absolute, with a stable id; pure
    states.py            what can be asked of any cluster, and how a job is doing
    package.py           which files of the checkout travel
    ray_jobs.py          the Ray Jobs API of any running Ray cluster
    overlays.py          a kustomization of k8s/overlays, rendered
    rayjob.py            a run as a KubeRay RayJob; pure
    rules.py             the operator's own rules for one; pure
    troubles.py          what goes wrong with its pods, one line each; pure
    progress.py          how far it has come on its way to the driver, one line each step; pure
    run_state.py         how it is doing, in the words that all clusters share; pure
    kubernetes_api.py    what is asked of the Kubernetes API server
    driver_log.py        the driver's log, out of what the submitter's container says
    following.py         one person's look at a run, to its end
    kubernetes_jobs.py   a run on KubeRay: submit, follow, list, cancel
    run_folder.py        what lies where a run writes: its settings, its logs
    sizing.py            what changes at 8, 64 and 512 GPUs; pure

Nothing here imports torch or `jobs`; ray and kubernetes are imported once something is sent.
"""
