"""Connect to the API server of a kubeconfig, or in a pod to that of its cluster."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
import yaml
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config
from kubernetes.config import ConfigException, kube_config

from cluster.kuberay.api import Api
from cluster.kuberay.overlays import Document
from cluster.targets import is_remote
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
        return Api(kubernetes_client.ApiClient(settings), namespace or _pod_namespace(), "")
    if errors and not (settings.api_key or settings.cert_file):
        why = _first_line(errors[-1].getMessage())
        raise AccessError(
            f"kubernetes: context {chosen['name']}: its log-in gives no credentials ({why}); "
            "install the plugin that the kubeconfig names, or log in"
        )
    own = chosen["context"].get("namespace")
    return Api(kubernetes_client.ApiClient(settings), namespace or own or "default", chosen["name"])


_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

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
    merged = kube_config.KubeConfigMerger(kube_config.KUBE_CONFIG_DEFAULT_LOCATION)
    clusters = merged.config["clusters"]
    cluster = clusters.get_with_name(chosen["context"]["cluster"])["cluster"]
    settings.proxy = _find_proxy(settings.host, cluster.safe_get("proxy-url"))
    return dict(chosen)


def _find_proxy(server: str, proxy_url: str | None) -> str | None:
    """The proxy that kubectl would use: the client knows no `proxy-url`, and takes HTTP_PROXY for
    every server."""
    if proxy_url and urlsplit(proxy_url).scheme not in {"http", "https"}:
        raise ConfigError(f"kubernetes: proxy-url {proxy_url}: only http and https are supported")
    host = urlsplit(server)
    if proxy_url or not is_remote(server) or proxy_bypass(host.netloc):
        return proxy_url
    return getproxies().get(host.scheme)


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


def _pod_namespace() -> str:
    try:
        return _POD_NAMESPACE.read_text().strip() or "default"
    except OSError:
        return "default"


def _flaw(error: BaseException) -> str:
    """What is wrong with a kubeconfig, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', 'no YAML')}"
    return _first_line(error)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
