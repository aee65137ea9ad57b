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
    kubernetes_api.py    what is asked of the Kubernetes API server
    kubernetes_jobs.py   a run on KubeRay
    sizing.py            what changes at 8, 64 and 512 GPUs; pure

Nothing here imports torch or `jobs`; ray and kubernetes are imported once something is sent.
"""
