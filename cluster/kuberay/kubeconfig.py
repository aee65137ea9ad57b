"""Connect to the API server of a kubeconfig, or in a pod to that of its cluster."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
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
    """The API server that kubectl would use; in a pod without a kubeconfig, that of its cluster.

    Raises ConfigError without a usable kubeconfig, AccessError where its log-in fails.
    """
    settings = kubernetes_client.Configuration()
    settings.retries = False
    # A kubeconfig may turn off TLS verification, as for kubectl; urllib3 would warn each request.
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
        why = _first_line(errors[-1].getMessage())
        raise AccessError(
            f"kubernetes: context {chosen['name']}: its log-in gives no credentials ({why}); "
            "install the plugin that the kubeconfig names, or log in"
        )
    own = chosen["context"].get("namespace")
    return Api(kubernetes_client.ApiClient(settings), namespace or own or "default", chosen["name"])


_UNUSABLE = (
    ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError,
)  # fmt: skip
"""Errors of the client about a kubeconfig that it cannot read."""


def _load_context(settings: Any, context: str | None) -> Document:
    """Load a context of the kubeconfig, by default the current one; returns the context."""
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
def _logged_errors() -> Iterator[list[logging.LogRecord]]:
    """Collect the errors that the client logs: where a credential plugin fails, it raises none."""
    keeper = BufferingHandler(capacity=1000)
    keeper.setLevel(logging.ERROR)
    logging.getLogger().addHandler(keeper)
    try:
        yield keeper.buffer
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
