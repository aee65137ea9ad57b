"""The API server that a kubeconfig names, or a pod's own, with the credentials to ask it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import urllib3
import yaml
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config
from kubernetes.config import ConfigException

from cluster.kuberay.api import Api
from cluster.kuberay.overlays import Document
from pneumo.errors import AccessError, ConfigError


def connect(context: str | None, namespace: str | None) -> Api:
    """The API server that kubectl would ask. Raises ConfigError when no kubeconfig names one.

    In a pod without a kubeconfig it is the pod's own cluster.
    """
    settings = kubernetes_client.Configuration()
    settings.retries = False
    # A kubeconfig may say so, as kubectl takes it; urllib3 would warn at every request.
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    try:
        with _logged_errors() as errors:
            chosen = _load_context(settings, context)
    except _UNUSABLE as error:
        if "current-context" in str(error):
            raise ConfigError(
                "kubernetes: the kubeconfig has no current context; set one: kubectl config "
                "use-context NAME (kubectl config get-contexts lists them)"
            ) from error
        if context is not None or not _load_pod(settings):
            raise ConfigError(
                f"kubernetes: no usable kubeconfig ({_flaw(error)}); set KUBECONFIG, or get one "
                "from your cloud (aws eks update-kubeconfig, gcloud container clusters "
                "get-credentials)"
            ) from error
        return Api(kubernetes_client.ApiClient(settings), namespace or "default", "")
    if errors and not (settings.api_key or settings.cert_file):
        raise AccessError(
            f"kubernetes: context {chosen['name']}: its log-in gives no credentials "
            f"({_first_line(errors[-1])}); install the plugin that the kubeconfig names, or log in"
        )
    own = chosen["context"].get("namespace")
    return Api(kubernetes_client.ApiClient(settings), namespace or own or "default", chosen["name"])


_UNUSABLE = (
    ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError,
)  # fmt: skip
"""What the client raises about a kubeconfig that it cannot read."""


def _load_context(settings: Any, context: str | None) -> Document:
    """Load a context of the kubeconfig, by default the current one; what it says."""
    found, current = kubernetes_config.list_kube_config_contexts()
    chosen = next((c for c in found if c["name"] == context), None) if context else current
    if chosen is None:
        names = ", ".join(sorted(c["name"] for c in found)) or "none"
        raise ConfigError(f"kubernetes: no context '{context}' in the kubeconfig; has: {names}")
    kubernetes_config.load_kube_config(
        context=chosen["name"], client_configuration=settings, persist_config=False
    )
    return dict(chosen)


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """What the client logs meanwhile: it goes on without credentials where a plugin fails."""
    errors: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    keeper = Keeper(logging.ERROR)
    logging.getLogger().addHandler(keeper)
    try:
        yield errors
    finally:
        logging.getLogger().removeHandler(keeper)


def _load_pod(settings: Any) -> bool:
    try:
        kubernetes_config.load_incluster_config(client_configuration=settings)
    except ConfigException:
        return False
    return True


def _flaw(error: BaseException) -> str:
    """What is wrong with a kubeconfig, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', 'no YAML')}"
    return _first_line(error)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
