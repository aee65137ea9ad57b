"""Requests to a Kubernetes API server: RayJobs, pods, their logs and events, as plain JSON.

Every request has a time limit. Temporary errors (429, 5xx, a broken connection) are retried for a
while; every other refusal becomes an error of this project, in one line. Creating is safe to retry,
because a RayJob's name identifies its run.
"""

import json
import re
import time
from collections.abc import Generator, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import urllib3
from kubernetes.client.exceptions import ApiException

from cluster.kuberay.overlays import Document
from cluster.targets import OutOfReachError, why_unanswered
from pneumo.errors import AccessError, ClusterError, ConfigError, PneumoError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 20.0
RETRY_TIMEOUT_S = 20.0
"""How long a request with temporary errors is retried."""
_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 5.0
_EVENTS_PER_PAGE = "500"
_DELETED_TIMEOUT_S = 2
"""How long to wait for the API server's record of pods that it has deleted already."""
_ANONYMOUS = 'User "system:anonymous" '
"""In messages of a server that allows anonymous requests, a user without valid credentials."""
_TEMPORARY = frozenset({408, 429, 500, 502, 503, 504})

NEEDS = (
    *(("ray.io", "rayjobs", verb) for verb in ("create", "get", "list", "watch", "delete")),
    ("", "pods", "list"),
    ("", "events", "list"),
    ("", "pods/log", "get"),
)
"""(API group, resource, verb) of the requests below, without which no run is submitted."""
OPTIONAL_NEEDS = (("", "pods", "watch"),)
"""Those that a user may lack; k8s/rbac grants these and NEEDS, and no others."""


class ForbiddenError(AccessError):
    """The user is authenticated, and lacks a right."""


class AlreadyThereError(ClusterError):
    """An object of that name exists already."""


class ExpiredError(ClusterError):
    """The resource version of a watch or list is too old; read the object again."""


class MissingError(ClusterError):
    """No object of that name exists."""


class UnknownRunError(ConfigError):
    """No RayJob of that name exists; it may have been deleted."""


class PodList(NamedTuple):
    """Pods, and the resource version of their list."""

    items: list[Document]
    version: str


@dataclass(frozen=True)
class Api:
    """An API server and a namespace; `context` of the kubeconfig, "" for a pod's own cluster."""

    client: Any
    namespace: str
    context: str
    retry_timeout_s: float = RETRY_TIMEOUT_S

    @property
    def place(self) -> str:
        """Its name in messages."""
        return f"context {self.context}" if self.context else "this pod's cluster"

    def create_rayjob(self, job: Document) -> Document:
        """Raises AlreadyThereError; ConfigError for an invalid RayJob or an unknown namespace."""
        return self._ask("POST", self._rayjobs(), {"fieldValidation": "Strict"}, job)

    def get_rayjob(self, name: str) -> Document:
        """Raises MissingError."""
        return self._ask("GET", self._rayjobs(name))

    def list_rayjobs(self, selector: str) -> list[Document]:
        return list(self._ask("GET", self._rayjobs(), {"labelSelector": selector})["items"])

    def delete_rayjob(self, name: str) -> None:
        """Raises MissingError."""
        self._ask("DELETE", self._rayjobs(name), {"propagationPolicy": "Background"})

    def list_pods(self, selector: str) -> PodList:
        answer = self._ask("GET", self._core("pods"), {"labelSelector": selector})
        return PodList(answer["items"], answer["metadata"]["resourceVersion"])

    def find_deleted(self, selector: str, before: PodList, names: Set[str]) -> list[Document]:
        """The last state of the pods `names`, which were deleted since the list `before`.

        Lacks those that the API server does not remember: it keeps some minutes of changes; and
        all of them where the user has no right to watch pods.
        """
        query = {
            "watch": "true",
            "labelSelector": selector,
            "resourceVersion": before.version,
            "timeoutSeconds": str(_DELETED_TIMEOUT_S),
        }
        found: dict[str, Document] = {}
        with suppress(ExpiredError, ForbiddenError, OutOfReachError, ValueError):
            for line in self._stream(self._core("pods"), query, ANSWER_TIMEOUT_S):
                change = json.loads(line)
                if change.get("type") == "DELETED":
                    found[change["object"]["metadata"]["name"]] = change["object"]
                if found.keys() >= names:
                    break
        return [pod for name, pod in found.items() if name in names]

    def list_warnings(self) -> list[Document]:
        """The namespace's events about problems: all of type Warning, and evictions by taint, which
        Kubernetes reports as Normal."""
        return [
            *self._list_events("type=Warning"),
            *self._list_events("type=Normal,reason=TaintManagerEviction"),
        ]

    def _list_events(self, selector: str) -> Iterator[Document]:
        query = {"fieldSelector": selector, "limit": _EVENTS_PER_PAGE}
        while True:
            page = self._ask("GET", self._core("events"), query)
            yield from page["items"]
            position = page["metadata"].get("continue")
            if not position:
                return
            query["continue"] = position

    def wait_for_change(self, name: str, version: str, timeout_s: int) -> None:
        """Return when the RayJob is newer than `version`, or after `timeout_s`.

        Also returns when the watch breaks or has expired, as the caller reads the RayJob anyway.
        """
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "timeoutSeconds": str(timeout_s),
        }
        start_s = time.monotonic()
        with suppress(ExpiredError, OutOfReachError, ValueError):
            for line in self._stream(self._rayjobs(), query, timeout_s + ANSWER_TIMEOUT_S):
                if json.loads(line).get("type") != "BOOKMARK":
                    return
        # A watch that ends at once must not make the caller's loop busy.
        time.sleep(max(0.0, min(1.0, timeout_s) - (time.monotonic() - start_s)))

    def stream_log(
        self, pod: str, container: str, *, since: str, follow: bool, idle_timeout_s: float
    ) -> Generator[str]:
        """The lines of a container's log, each with its time stamp, from the second of `since` on.

        Raises OutOfReachError when the connection breaks or is idle for `idle_timeout_s`.
        """
        query = {"container": container, "timestamps": "true", "follow": str(follow).lower()}
        if since:
            query["sinceTime"] = since
        yield from self._stream(f"{self._core('pods')}/{pod}/log", query, idle_timeout_s)

    def missing_rights(self) -> list[str]:
        """The rights of `NEEDS` that the user lacks, as "verb resource"; empty where unknown."""
        missing = []
        for group, resource, verb in NEEDS:
            name, _, part = resource.partition("/")
            right = {"group": group, "resource": name, "subresource": part, "verb": verb}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {**right, "namespace": self.namespace}},
            }
            try:
                answer = self._ask(
                    "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review
                )
            except ForbiddenError:
                return []
            if not answer["status"]["allowed"]:
                missing.append(f"{verb} {resource}")
        return missing

    def _rayjobs(self, name: str = "") -> str:
        path = f"/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs"
        return f"{path}/{name}" if name else path

    def _core(self, resource: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{resource}"

    def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Document | None = None,
    ) -> Document:
        deadline_s = time.monotonic() + self.retry_timeout_s
        pause_s = _PAUSE_S
        while True:
            try:
                response = self._send(method, path, query, body, ANSWER_TIMEOUT_S)
                answer: Document = json.loads(response.data)
            except (ApiException, urllib3.exceptions.HTTPError, ValueError) as error:
                if not _is_temporary(error) or time.monotonic() + pause_s > deadline_s:
                    raise self._refusal(error, method) from error
                time.sleep(max(pause_s, _retry_after_s(error)))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                return answer

    def _stream(self, path: str, query: Mapping[str, str], idle_timeout_s: float) -> Generator[str]:
        """The lines of an answer as they come."""
        rest = b""
        response = None
        try:
            response = self._send("GET", path, query, None, idle_timeout_s)
            while chunk := response.read1(2**16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise self._refusal(error, "GET") from error
        finally:
            if response is not None:
                response.close()
        if rest:
            yield rest.decode(errors="replace")

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Document | None,
        answer_timeout_s: float,
    ) -> urllib3.HTTPResponse:
        response: urllib3.HTTPResponse = self.client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=(CONNECT_TIMEOUT_S, answer_timeout_s),
        )
        return response

    def _refusal(self, error: Exception, method: str) -> PneumoError:
        """What the error of the client means, as an error of this project."""
        where = f"kubernetes: {self.place}"
        if not isinstance(error, ApiException) or error.status == 0:
            return OutOfReachError(
                f"{where}: no answer from the API server ({why_unanswered(error)}); is the cluster "
                "up, and does a VPN or proxy lead there?"
            )
        code, status = error.status, _status(error)
        message = str(status.get("message") or error.reason or "no reason given").splitlines()[0]
        if code == 401 or (code == 403 and _ANONYMOUS in message):
            return AccessError(
                f"{where}: the cluster does not know you (HTTP {code}): a token or client "
                "certificate of the kubeconfig has expired, or is another cluster's; log in again"
            )
        if code == 403:
            return ForbiddenError(f"{where}: {_forbidden(message)}")
        details = status.get("details") or {}
        if code == 404 and details.get("kind") == "namespaces":
            return ConfigError(f"{where}: no namespace '{details.get('name')}'; give --namespace")
        if code == 404 and not details.get("name"):
            return ConfigError(
                f"{where}: it has no RayJob kind (ray.io/v1); have its administrator install the "
                "KubeRay operator, 1.7 or later"
            )
        kinds = {404: MissingError, 410: ExpiredError}
        kinds |= {409: AlreadyThereError} if method == "POST" else {}
        if code in kinds:
            return kinds[code](f"{where}: {message}")
        if code in _TEMPORARY:
            return OutOfReachError(f"{where}: the API server answers HTTP {code}: {message}")
        unknown = re.findall(r'unknown field "([^"]+)"', message)
        if unknown:
            return ConfigError(
                f"{where}: its KubeRay knows no field {', '.join(unknown)}; correct the "
                "overlay, or have the operator and its CRDs updated to 1.7 or later"
            )
        message = message.rpartition("error: ")[2].partition(", <nil>: ")[0]  # CEL was skipped
        return ConfigError(f"{where}: refused (HTTP {code}): {message}")


def _is_temporary(error: Exception) -> bool:
    return not isinstance(error, ApiException) or error.status in _TEMPORARY


def _retry_after_s(error: Exception) -> float:
    """The Retry-After header of a 429 or 503, at most _LONGEST_PAUSE_S."""
    headers = getattr(error, "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return min(float(value), _LONGEST_PAUSE_S) if value.isdigit() else 0.0


def _status(error: ApiException) -> Document:
    """The Status object of a refusal; empty where there is none."""
    try:
        status = json.loads(error.body or "{}")
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}


def _forbidden(message: str) -> str:
    """The line about a missing right, from the server's message."""
    found = re.search(
        r'cannot (\w+) resource "([^"]+)"(?: in API group "[^"]*")?'
        r'(?: in the namespace "([^"]+)")?',
        message,
    )
    if found is None:
        return f"forbidden (HTTP 403): {message}"
    verb, resource, namespace = found.groups()
    return lacking([f"{verb} {resource}"], namespace or "")


def lacking(rights: list[str], namespace: str) -> str:
    """The message about missing rights."""
    place = f" in namespace {namespace}" if namespace else ""
    return (
        f"no right to {', '.join(rights)}{place}; ask its administrator to bind you to the Role of "
        "k8s/rbac"
    )
