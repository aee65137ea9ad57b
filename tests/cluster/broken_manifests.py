"""Mistakes in the manifests, and what catches each."""

import copy
from collections.abc import Callable
from typing import Any

Document = dict[str, Any]


def job_of(documents: list[Document]) -> Document:
    [job] = [document for document in documents if document["kind"] == "RayJob"]
    return copy.deepcopy(job)


def of_kind(documents: list[Document], kind: str) -> Document:
    [found] = [document for document in documents if document["kind"] == kind]
    return copy.deepcopy(found)


def templates(job: Document) -> dict[str, Document]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = job["spec"]["submitterPodTemplate"]
    return {"head": cluster["headGroupSpec"]["template"], **groups, "submitter": submitter}


def as_pod(name: str, template: Document) -> Document:
    metadata = {**template["metadata"], "name": name}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


Break = Callable[[Document], object]


def _spec(job: Document) -> Document:
    spec: Document = job["spec"]
    return spec


def head_of(job: Document) -> Document:
    head: Document = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    return head


def _container(job: Document) -> Document:
    container: Document = head_of(job)["template"]["spec"]["containers"][0]
    return container


def _deletes(**more: Any) -> Break:
    rules = [{"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED"}}]
    return lambda job: _spec(job).update(deletionStrategy={"deletionRules": rules}, **more)


def _pod(job: Document) -> Document:
    pod: Document = head_of(job)["template"]["spec"]
    return pod


def _cluster(job: Document) -> Document:
    cluster: Document = _spec(job)["rayClusterSpec"]
    return cluster


def _scale(job: Document) -> None:
    _cluster(job).update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"})
    _pod(job).update(restartPolicy="Always")


BROKEN: dict[str, tuple[str, Break, str]] = {
    "a misspelt field": ("RayJob", lambda job: _spec(job).update(backofLimit=1), "schema server"),
    "a misspelt field at the root": ("RayJob", lambda job: job.update(sepc={}), "schema server"),
    "a misspelt field of a container": (
        "RayJob",
        lambda job: _container(job).update(imagePullPolciy="Always"),
        "schema server pods",
    ),
    "a number for a string": (
        "RayJob",
        lambda job: head_of(job)["rayStartParams"].update({"num-cpus": 0}),
        "schema server",
    ),
    "a value outside an enum": (
        "RayJob",
        lambda job: _cluster(job)["authOptions"].update(mode="tokens"),
        "schema server",
    ),
    "a required field missing": (
        "RayJob",
        lambda job: _cluster(job).pop("headGroupSpec"),
        "schema server",
    ),
    "a runtimeEnvYAML that is no YAML": (
        "RayJob",
        lambda job: _spec(job).update(runtimeEnvYAML="env_vars: {A: 1"),
        "rules",
    ),
    "suspend without shutdown": (
        "RayJob",
        lambda job: _spec(job).update(
            suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0
        ),
        "rules",
    ),
    "suspend with deletion rules": (
        "RayJob",
        _deletes(suspend=True, shutdownAfterJobFinishes=True),
        "rules",
    ),
    "shutdown with deletion rules": ("RayJob", _deletes(), "rules"),
    "a TTL without shutdown": (
        "RayJob",
        lambda job: _spec(job).update(shutdownAfterJobFinishes=False),
        "rules",
    ),
    "a negative backoffLimit": ("RayJob", lambda job: _spec(job).update(backoffLimit=-1), "rules"),
    "a deadline of zero": (
        "RayJob",
        lambda job: _spec(job).update(activeDeadlineSeconds=0),
        "rules",
    ),
    "an unknown submissionMode": (
        "RayJob",
        lambda job: _spec(job).update(submissionMode="K8sJobmode"),
        "rules",
    ),
    "SidecarMode with a submitter": (
        "RayJob",
        lambda job: _spec(job).update(submissionMode="SidecarMode"),
        "rules",
    ),
    "InteractiveMode with retries": (
        "RayJob",
        lambda job: _spec(job).update(submissionMode="InteractiveMode", backoffLimit=1),
        "rules",
    ),
    "token authentication on Ray 2.51": (
        "RayJob",
        lambda job: _cluster(job).update(rayVersion="2.51.0"),
        "rules",
    ),
    "token authentication by Kubernetes": (
        "RayJob",
        lambda job: _cluster(job)["authOptions"].update(enableK8sTokenAuth=True),
        "rules",
    ),
    "autoscaler v2 with pods that restart": ("RayJob", _scale, "rules"),
    "resources said twice": (
        "RayJob",
        lambda job: head_of(job).update(resources={"CPU": "1"}),
        "rules",
    ),
    # What is wrong with the pods, KubeRay's schema takes for words.
    "an unknown toleration operator": (
        "RayJob",
        lambda job: _pod(job).update(tolerations=[{"key": "x", "operator": "Exits"}]),
        "pods",
    ),
    "an unknown restartPolicy": (
        "RayJob",
        lambda job: _pod(job).update(restartPolicy="Nevr"),
        "pods",
    ),
    "an unknown imagePullPolicy": (
        "RayJob",
        lambda job: _container(job).update(imagePullPolicy="Alwasy"),
        "pods",
    ),
    "an unknown seccomp profile": (
        "RayJob",
        lambda job: _pod(job)["securityContext"].update(seccompProfile={"type": "Default"}),
        "pods",
    ),
    "a mount without its volume": (
        "RayJob",
        lambda job: _container(job)["volumeMounts"].append({"name": "x", "mountPath": "/x"}),
        "pods",
    ),
    "two containers of one name": (
        "RayJob",
        lambda job: _pod(job)["containers"].append(copy.deepcopy(_container(job))),
        "server pods",
    ),
    "requests above limits": (
        "RayJob",
        lambda job: _container(job)["resources"]["requests"].update(memory="900Gi"),
        "pods",
    ),
    "a label that is none": (
        "RayJob",
        lambda job: head_of(job)["template"]["metadata"]["labels"].update(team="a b"),
        "pods",
    ),
    "port 99999": (
        "RayJob",
        lambda job: _container(job)["ports"].append({"name": "x", "containerPort": 99999}),
        "pods",
    ),
    "a misspelt field of a core kind": (
        "NetworkPolicy",
        lambda policy: policy["spec"].update(igress=[]),
        "schema server",
    ),
    "a port that is no number": (
        "NetworkPolicy",
        lambda policy: policy["spec"]["ingress"][1]["ports"][0].update(port=[8265]),
        "schema server",
    ),
    "an account's secrets that are no list": (
        "ServiceAccount",
        lambda account: account.update(secrets="pneumo-secrets"),
        "schema server",
    ),
    # What only a cluster can know: the preflight or the problems tell it.
    "an image that does not exist": (
        "RayJob",
        lambda job: _container(job).update(image="r.io/nothing@sha256:" + "0" * 64),
        "",
    ),
    "a secret that does not exist": (
        "RayJob",
        lambda job: _cluster(job)["authOptions"].update(secretName="nothing"),
        "",
    ),
    "more memory than any node has": (
        "RayJob",
        lambda job: _container(job)["resources"]["limits"].update(memory="9000Gi"),
        "",
    ),
    "a selector that selects nobody": (
        "NetworkPolicy",
        lambda policy: policy["spec"]["podSelector"]["matchLabels"].update(app="nobody"),
        "",
    ),
}
"""What is broken -> kind, how to break it, and the checks that find it: `schema`, a strict schema;
`rules`, `kuberay.operator_rules`; `server`, an API server asked to create the object; `pods`, one
asked to create its pods, of whose fields KubeRay's schema says little."""
