"""A client of a Ray cluster's dashboard, with time limits and this project's errors.

The token comes from the environment as Ray reads it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, else
~/.ray/auth_token."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.targets import OutOfReachError, is_remote, why_unanswered
from pneumo.errors import AccessError, ConfigError, PneumoError

CONNECT_TIMEOUT_S = 5.0

FIRST_ANSWER_TIMEOUT_S = 5.0

ANSWER_TIMEOUT_S = 60.0

_BUSY = frozenset({408, 429})
"""HTTP statuses of temporary errors, besides 5xx."""


class BusyError(OutOfReachError):
    """The dashboard, or a proxy before it, answered with a temporary error."""


class RefusedError(PneumoError):
    """The cluster refused the request; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Client(JobSubmissionClient):  # type: ignore[misc]  # ray is untyped
    """Ray's client with time limits and this project's errors.

    Ray's own client sets no timeout on a request, and raises plain RuntimeErrors. The two methods
    below are private to Ray, which is why Ray is pinned to one minor release.
    """

    session_name = ""
    """Name of the cluster's session folder on its head."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer_s = FIRST_ANSWER_TIMEOUT_S if endpoint == "/api/version" else ANSWER_TIMEOUT_S
        options.setdefault("timeout", (CONNECT_TIMEOUT_S, answer_s))
        if not is_remote(self._address):  # a forwarded port, which no proxy knows
            options.setdefault("proxies", {"http": "", "https": ""})
        try:
            response: requests.Response = super()._do_request(method, endpoint, **options)
        except AuthenticationError as error:
            raise AccessError(
                f"cluster: {self._address} refuses the token; set RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the one that the cluster was started with"
            ) from error
        except requests.RequestException as error:
            raise OutOfReachError(
                f"cluster: no answer from {self._address} ({why_unanswered(error)}); is the "
                "address that of a running Ray dashboard, and is the port forwarded?"
            ) from error
        if endpoint == "/api/version" and not _is_dashboard(response):
            if _is_busy(response):
                self._raise_error(response)
            raise ConfigError(
                f"cluster: {self._address} answers, but is no Ray dashboard (HTTP "
                f"{response.status_code}); give its address, usually http://HEAD:8265"
            )
        if endpoint == "/api/version":
            self.session_name = str(response.json().get("session_name", ""))
        return response

    def _raise_error(self, r: requests.Response) -> NoReturn:
        lines = r.text.strip().splitlines() or ["no reason given"]
        if _is_busy(r):
            raise BusyError(f"cluster: {self._address} answers HTTP {r.status_code}: {lines[-1]}")
        raise RefusedError(
            f"cluster: {self._address} refused (HTTP {r.status_code}): {lines[-1]}", r.status_code
        )

    @property
    def is_here(self) -> bool:
        """Whether the head runs on this machine, with its files: a forwarded port has a loopback
        address too. Ray's temporary folder is that of RAY_TMPDIR, else /tmp."""
        sessions = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray")
        return bool(self.session_name) and (sessions / self.session_name).is_dir()

    def details(self, job_id: str) -> JobDetails:
        """What the cluster knows of a job. Raises ConfigError for an unknown job."""
        with self.unknown_job(job_id):
            return self.get_job_info(job_id)

    def log_text(self, job_id: str) -> str:
        """The job's log so far; empty when its node is gone. Raises ConfigError for an unknown job,
        BusyError where another try may succeed."""
        try:
            with self.unknown_job(job_id):
                return str(self.get_job_logs(job_id))
        except RefusedError:
            return ""

    @contextmanager
    def unknown_job(self, job_id: str) -> Iterator[None]:
        """Raise ConfigError where the cluster answers that it knows no such job."""
        try:
            yield
        except RefusedError as error:
            if error.status != 404:
                raise
            raise ConfigError(
                f"cluster: no job '{job_id}' at {self.get_address()}; "
                "python -m cluster list shows those it knows"
            ) from error


def connect(address: str, environ: Mapping[str, str]) -> Client:
    """A client of the dashboard at `http://host:port`.

    Raises ConfigError for a malformed address, AccessError for a wrong token, OutOfReachError when
    nothing answers within seconds.
    """
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"cluster: got address '{address}', expected that of the dashboard: http://HEAD:8265"
        )
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    token = _token(environ)
    with _without_variables("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        return Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)


@contextmanager
def _without_variables(*names: str) -> Iterator[None]:
    """Hide these variables from Ray, which would use them instead of the address given."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named is None:
            return None
        raise ConfigError(
            f"cluster: RAY_AUTH_TOKEN_PATH={path}: {error.strerror}; give a readable file"
        ) from error


def sends_token_openly(address: str, environ: Mapping[str, str]) -> bool:
    """Whether the token is sent unencrypted over a network."""
    return address.startswith("http://") and is_remote(address) and bool(_token(environ))


def _is_dashboard(response: requests.Response) -> bool:
    try:
        return response.ok and "ray_version" in response.json()
    except (requests.JSONDecodeError, TypeError):
        return False


def _is_busy(response: requests.Response) -> bool:
    return response.status_code in _BUSY or response.status_code >= 500
