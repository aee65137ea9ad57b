"""The API server, its proxy and the namespace are those that kubectl would use."""

from pathlib import Path

import pytest
import yaml
from kubernetes.config import incluster_config, kube_config

from cluster.kuberay import kubeconfig
from cluster.kuberay.kubeconfig import connect
from pneumo.errors import ConfigError

FAR, HERE = "https://api.example.org:6443", "https://127.0.0.1:6443"
BASTION = "http://bastion:3128"
PLAIN, SECURE = "http://plain:1", "http://secure:2"


@pytest.fixture(autouse=True)
def _proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", PLAIN)
    monkeypatch.setenv("HTTPS_PROXY", SECURE)


def write(path: Path, server: str, **cluster: str) -> None:
    config = {
        "current-context": "mine",
        "clusters": [
            {"name": "other", "cluster": {"server": FAR, "proxy-url": "http://other:1"}},
            {"name": "c", "cluster": {"server": server, **cluster}},
        ],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "mine", "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("server", "cluster", "no_proxy", "proxy"),
    [
        (FAR, {}, "", SECURE),
        (FAR.replace("https", "http"), {}, "", PLAIN),
        (FAR, {"proxy-url": BASTION}, "", BASTION),
        (FAR, {"proxy-url": BASTION}, "example.org", BASTION),
        (FAR, {}, "example.org", None),
        (HERE, {}, "", None),
        (HERE, {"proxy-url": BASTION}, "", BASTION),
    ],
)
def test_the_proxy_is_kubectls(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    cluster: dict[str, str],
    no_proxy: str,
    proxy: str | None,
) -> None:
    write(tmp_path / "config", server, **cluster)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    monkeypatch.setenv("NO_PROXY", no_proxy)
    settings = connect(None, None).client.configuration
    assert (settings.host, settings.proxy) == (server, proxy)


def test_a_proxy_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "config", FAR, **{"proxy-url": "socks5://bastion:1"})
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match="only http and https"):
        connect(None, None)


def test_in_a_pod_the_namespace_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    for name, text in (("token", "t"), ("cert", "c"), ("namespace", "team\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "cert"))
    monkeypatch.setattr(kubeconfig, "_POD_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert connect(None, None).namespace == "team"
    assert connect(None, "given").namespace == "given"
