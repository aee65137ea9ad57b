"""Runs on Kubernetes, as KubeRay RayJobs."""
