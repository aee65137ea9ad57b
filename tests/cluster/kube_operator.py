"""What a Kubernetes cluster with KubeRay does to a RayJob, as far as a person sees it; simulated.

`Operator` takes RayJobs of one namespace through the states of KubeRay 1.7: suspended, pods,
running, retried, ended, deleted. Their pods are objects that nothing runs; the entrypoint runs as a
Ray job on a real Ray cluster of this machine, with the environment that the head's container has.
`Kubelet` gives the API server the log of the submitter's pod, which is the driver's.
"""

from __future__ import annotations

import ssl
import subprocess
import tempfile
import threading
import time
import traceback
import urllib.error
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cluster import package, ray_jobs
from pneumo.errors import PneumoError
from tests.cluster.kube_server import KubeServer

Document = dict[str, Any]
NODE = "node-1"
FINALIZER = "ray.io/rayjob-finalizer"


class Kubelet:
    """The logs of pods over HTTPS, as the API server asks a node for them.

    Times are printed as the container runtime writes them: in the zone of the node.
    """

    def __init__(self, server: KubeServer, zone: tzinfo) -> None:
        self.zone = zone
        self.zone_of: dict[str, tzinfo] = {}
        """Of a pod's node, where it is another."""
        self.lines: dict[str, list[tuple[datetime, str]]] = {}
        self.ended: set[str] = set()
        key, certificate = server.folder / "kubelet.key", server.folder / "kubelet.crt"
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node-1",
                "-keyout", str(key), "-out", str(certificate), "-days", "2",
            ],
            capture_output=True, check=True,
        )  # fmt: skip
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        server.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        server.ask(
            "PATCH",
            f"/api/v1/nodes/{NODE}/status",
            {
                "status": {
                    "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
                    "daemonEndpoints": {"kubeletEndpoint": {"Port": self._http.server_port}},
                }
            },
            patch=True,
        )

    def write(self, pod: str, text: str) -> None:
        self.lines.setdefault(pod, []).append((datetime.now(UTC), text))

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = {k: v[0] for k, v in parse_qs(parts.query).items()}
                pod = parts.path.split("/")[3]  # /containerLogs/<namespace>/<pod>/<container>
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with suppress(OSError):
                    kubelet._send(pod, query, self._chunk)
                    self._chunk("")

            def _chunk(self, text: str) -> None:
                data = text.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _send(self, pod: str, query: dict[str, str], chunk: Callable[[str], None]) -> None:
        since = datetime.fromisoformat(query.get("sinceTime", "1970-01-01T00:00:00Z"))
        sent = 0
        while True:
            ended = pod in self.ended
            lines = self.lines.get(pod, [])
            for moment, text in lines[sent:]:
                if moment >= since:
                    chunk(f"{self._stamp(moment, pod)} {text}\n")
            sent = len(lines)
            if ended or query.get("follow") != "true":
                return
            time.sleep(0.1)

    def _stamp(self, moment: datetime, pod: str) -> str:
        zone = self.zone_of.get(pod, self.zone)
        there = moment.astimezone(zone).isoformat(timespec="microseconds")
        return f"{there[:26]}000{there[26:].replace('+00:00', 'Z')}"


@dataclass
class Operator:
    """Moves the RayJobs of `namespace` on, until closed.

    `admitted` is what Kueue decides, `image_there` what a registry answers, `preflight_says` with
    what the head's container of that name ends; the first `attempts_that_lose_the_head` do, once
    the job has said `lost_after`.
    """

    server: KubeServer
    ray: ray_jobs.Client
    kubelet: Kubelet
    namespace: str
    admitted: bool = True
    image_there: bool = True
    preflight_says: str = ""
    attempts_that_lose_the_head: int = 0
    lost_after: str = ""
    errors: list[str] = field(default_factory=list)
    _shown: dict[str, int] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Operator:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(timeout=20)
        if error is None:
            assert not self.errors, self.errors

    def warn(self, kind: str, name: str, reason: str, message: str) -> None:
        """An event of type Warning."""
        self.server.apply(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"generateName": f"{name}-"},
                "involvedObject": {"kind": kind, "name": name, "namespace": self.namespace},
                "reason": reason,
                "message": message,
                "type": "Warning",
                "lastTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
            self.namespace,
        )

    def set_pod(self, name: str, status: Document) -> None:
        self._patch(f"{self._core('pods')}/{name}/status", {"status": status})

    def _work(self) -> None:
        while not self._end.wait(0.2):
            try:
                for job in self.server.ask("GET", self._jobs())["items"]:
                    self._move(job)
            except urllib.error.HTTPError as error:
                if error.code not in {404, 409}:  # deleted or changed meanwhile: look again
                    self.errors.append(f"{error} {error.read()!r}")
            except Exception:  # told at the end of the test
                self.errors.append(traceback.format_exc())

    def _move(self, job: Document) -> None:
        name, status = job["metadata"]["name"], job.get("status") or {}
        if job["metadata"].get("deletionTimestamp"):
            self._take_down(job)
            self._patch(self._jobs(name), {"metadata": {"finalizers": None}})
            return
        state = status.get("jobDeploymentStatus", "")
        if state in {"", "Suspended"}:
            self._begin(job, state)
        elif state == "Initializing":
            self._initialise(job, status)
        elif state == "Running":
            self._run(job, status)
        elif state == "Retrying":
            self._take_down(job)
            self._set(name, jobDeploymentStatus="", jobStatus="", message="", reason="", jobId="")

    def _begin(self, job: Document, state: str) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        if not job["metadata"].get("finalizers"):
            self._patch(self._jobs(name), {"metadata": {"finalizers": [FINALIZER]}})
        if spec.get("suspend"):
            if state != "Suspended":
                self._set(name, jobDeploymentStatus="Suspended")
                message = "couldn't assign flavors to pod set workers: insufficient unused quota"
                self.warn("Workload", f"rayjob-{name}-1a2b3", "Pending", message)
            elif self.admitted:
                self._patch(self._jobs(name), {"spec": {"suspend": False}})
            return
        attempt = (job.get("status") or {}).get("failed", 0) + 1
        cluster = f"{name}-{attempt}abcd"
        spec = spec["rayClusterSpec"]
        head, group = spec["headGroupSpec"], spec["workerGroupSpecs"][0]
        own = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
        self._create_pod(f"{cluster}-head-x1", head["template"], own)
        for number in range(group["replicas"]):
            name_of_pod = f"{cluster}-workers-w{number}"
            self._create_pod(name_of_pod, group["template"], {**own, "ray.io/node-type": "worker"})
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._set(
            name, jobDeploymentStatus="Initializing", rayClusterName=cluster, startTime=now,
            jobId=f"{cluster}-job",
        )  # fmt: skip

    def _initialise(self, job: Document, status: Document) -> None:
        name = job["metadata"]["name"]
        pods = self._pods(name)
        if not self.image_there:
            for pod in pods:
                container = pod["spec"]["containers"][0]
                waiting = {"reason": "ImagePullBackOff", "message": "manifest unknown"}
                self.set_pod(
                    pod["metadata"]["name"],
                    {
                        "phase": "Pending",
                        "containerStatuses": [_container(container, {"waiting": waiting})],
                    },
                )
            return
        if self.preflight_says:
            head = next(pod for pod in pods if "-head-" in pod["metadata"]["name"])
            ended = {"exitCode": 2, "reason": "Error", "message": self.preflight_says}
            status = _container(head["spec"]["initContainers"][0], {"terminated": ended})
            waiting = {"phase": "Pending", "initContainerStatuses": [status]}
            self.set_pod(head["metadata"]["name"], waiting)
            return
        for pod in pods:
            self.set_pod(pod["metadata"]["name"], {"phase": "Running"})
        submitter = f"{status['rayClusterName']}-s"
        self._create_pod(submitter, job["spec"]["submitterPodTemplate"], {"job-name": name})
        self.set_pod(submitter, {"phase": "Running"})
        self._submit(job, status["jobId"])
        self._shown[submitter] = 0
        self._set(name, jobDeploymentStatus="Running", jobStatus="PENDING")

    def _submit(self, job: Document, job_id: str) -> None:
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        variables = {item["name"]: item["value"] for item in head["containers"][0]["env"]}
        variables.pop("HOME")
        with tempfile.TemporaryDirectory() as folder:  # what a pod has from its image
            package.stage(package.collect(), Path(folder))
            self.ray.submit_job(
                entrypoint=job["spec"]["entrypoint"],
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": variables},
            )

    def _run(self, job: Document, status: Document) -> None:
        name, job_id = job["metadata"]["name"], status["jobId"]
        submitter = f"{status['rayClusterName']}-s"
        info = ray_jobs.details(self.ray, job_id)
        lines = ray_jobs.logs(self.ray, job_id).splitlines(keepends=True)
        done = info.status.is_terminal()
        whole = [line for line in lines if done or line.endswith("\n")]
        for line in whole[self._shown[submitter] :]:
            self.kubelet.write(submitter, line.rstrip("\n"))
        self._shown[submitter] = len(whole)
        failed = status.get("failed", 0)
        said = bool(whole) and self.lost_after in "".join(whole)
        if self.attempts_that_lose_the_head > failed and said:
            self._lose_head(status["rayClusterName"], submitter, job_id)
            self._fail(job, failed, "AppFailed", "the head was lost", job_status="RUNNING")
        elif done:
            self.kubelet.ended.add(submitter)
            self.set_pod(submitter, {"phase": "Succeeded"})
            end = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if info.status.value == "FAILED":
                self._fail(job, failed, "AppFailed", info.message, endTime=end)
            else:
                self._set(
                    name, jobDeploymentStatus="Complete", jobStatus=info.status.value, endTime=end
                )
        elif status.get("jobStatus") != info.status.value:
            self._set(name, jobStatus=info.status.value)

    def _lose_head(self, cluster: str, submitter: str, job_id: str) -> None:
        with suppress(PneumoError):
            ray_jobs.cancel(self.ray, job_id)
        self.kubelet.ended.add(submitter)
        self.warn("Pod", f"{cluster}-head-x1", "NodeNotReady", "Node is not ready")
        self.server.ask("DELETE", f"{self._core('pods')}/{cluster}-head-x1?gracePeriodSeconds=0")
        time.sleep(1.5)

    def _fail(
        self,
        job: Document,
        failed: int,
        reason: str,
        message: str,
        *,
        job_status: str = "FAILED",
        **more: Any,
    ) -> None:
        again = failed < job["spec"].get("backoffLimit", 0)
        self._set(
            job["metadata"]["name"],
            jobDeploymentStatus="Retrying" if again else "Failed",
            jobStatus=job_status,
            reason=reason,
            message=message,
            failed=failed + 1,
            **more,
        )
        if again:
            time.sleep(2.0)  # KubeRay waits for the cluster to be gone

    def _take_down(self, job: Document) -> None:
        """What deleting the cluster and the submitter comes to; Ray's job is stopped first."""
        name, status = job["metadata"]["name"], job.get("status") or {}
        if status.get("jobId") and status.get("jobStatus") not in {"SUCCEEDED", "FAILED"}:
            with suppress(PneumoError):
                self.ray.stop_job(status["jobId"])
        for pod in self._pods(name):
            self.kubelet.ended.add(pod["metadata"]["name"])
            path = f"{self._core('pods')}/{pod['metadata']['name']}"
            self.server.ask("DELETE", f"{path}?gracePeriodSeconds=0")

    def _create_pod(self, name: str, template: Document, own: dict[str, str]) -> None:
        labels = {**template["metadata"]["labels"], **own}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": name, "labels": labels},
            "spec": {**template["spec"], "nodeName": NODE},
        }
        try:
            self.server.apply(pod, self.namespace)
        except urllib.error.HTTPError as error:
            if error.code != 409:  # of an earlier look, cut short
                raise

    def _pods(self, name: str) -> list[Document]:
        pods: list[Document] = self.server.ask(
            "GET", f"{self._core('pods')}?labelSelector=pneumo/run%3D{name}"
        )["items"]
        return pods

    def _set(self, name: str, **status: Any) -> None:
        self._patch(f"{self._jobs(name)}/status", {"status": status})

    def _patch(self, path: str, body: Document) -> None:
        self.server.ask("PATCH", path, body, patch=True)

    def _jobs(self, name: str = "") -> str:
        path = f"/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs"
        return f"{path}/{name}" if name else path

    def _core(self, resource: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{resource}"


def _container(spec: Document, state: Document) -> Document:
    return {
        "name": spec["name"],
        "image": spec["image"],
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": state,
    }
