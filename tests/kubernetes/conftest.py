"""One cluster for all tests of this folder, and a namespace of it for each test."""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs

from cluster.kuberay import overlays
from tests import CHECKOUT
from tests.kubernetes import namespaces
from tests.kubernetes.cluster import HOST, KUBECONFIG, OVERLAY, REASON, Document, KubeCluster, Team
from tests.kubernetes.probes import put, write_overlay
from tests.kubernetes.server import find_host
from tests.s3.server import ENDPOINT

NewTeam = Callable[..., Team]
TeamMaker = Callable[..., Team]


@pytest.fixture(scope="session")
def kube() -> KubeCluster:
    """The cluster, with its administrator's rights."""
    named = os.environ.get(KUBECONFIG)
    if not named:
        reason = os.environ.get(REASON) or f"`make test-kubernetes` starts one, or set {KUBECONFIG}"
        pytest.skip(f"no Kubernetes cluster: {reason}")
    return KubeCluster(Path(named), os.environ.get(HOST) or find_host(os.environ))


@pytest.fixture(scope="session")
def rendered() -> list[Document]:
    """The tests' overlay."""
    return overlays.render(OVERLAY)


@pytest.fixture(scope="session")
def s3_environ() -> dict[str, str]:
    """Environment variables for the S3 server; {} where there is none."""
    endpoint = os.environ.get(ENDPOINT)
    if not endpoint:
        return {}
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def files(s3_environ: dict[str, str]) -> s3fs.S3FileSystem:
    """The S3 server's files; used only where there is a bucket."""
    return s3fs.S3FileSystem(
        key=s3_environ["AWS_ACCESS_KEY_ID"],
        secret=s3_environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_environ["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )


@pytest.fixture(scope="session")
def bucket(s3_environ: dict[str, str], request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty bucket of the whole session; "" without an S3 server."""
    if not s3_environ:
        yield ""
        return
    files = request.getfixturevalue("files")
    name = f"pneumo-kubernetes-{uuid.uuid4().hex[:8]}"
    files.mkdir(name)
    yield f"s3://{name}"
    with contextlib.suppress(OSError):
        files.rm(name, recursive=True)


@pytest.fixture(scope="session")
def make_team(
    kube: KubeCluster, rendered: list[Document], bucket: str, s3_environ: dict[str, str]
) -> TeamMaker:
    """Makes a namespace with all that an administrator sets up; the caller removes it."""

    def make(folder: Path) -> Team:
        return namespaces.make_team(kube, rendered, folder, bucket=bucket, environ=s3_environ)

    return make


@pytest.fixture
def new_team(make_team: TeamMaker, tmp_path: Path) -> Iterator[NewTeam]:
    """Makes namespaces, and removes them at the end."""
    made: list[Team] = []

    def make() -> Team:
        made.append(make_team(tmp_path))
        return made[-1]

    yield make
    for team in made:
        namespaces.remove(team)


@pytest.fixture
def team(new_team: NewTeam) -> Team:
    """A namespace whose RayJobs are run."""
    return new_team()


@pytest.fixture
def idle_team(new_team: NewTeam, tmp_path: Path) -> Team:
    """A namespace whose RayJobs are never run, as they name another controller than KubeRay: for
    what happens before KubeRay starts a job."""
    managed_by = put("/spec/managedBy", "kueue.x-k8s.io/multikueue")
    return replace(new_team(), overlay=write_overlay(tmp_path / "idle", managed_by))


@pytest.fixture
def needs_bucket(bucket: str) -> None:
    """Skips where no S3 server is reachable from both pods and this machine."""
    if not bucket:
        pytest.skip(f"no S3 server that pods reach: name one in {ENDPOINT}, or set {HOST}")


@pytest.fixture(scope="session")
def store(bucket: str, s3_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few phantoms in the bucket."""
    source, url = tmp_path_factory.mktemp("source"), f"{bucket}/store"
    own = {name: value for name, value in os.environ.items() if not name.startswith("PNEUMO_")}
    for words in (
        ["pneumo.synthetic", "--out", str(source), "--studies", "60"],
        ["jobs.prepare", "--source", str(source), "--store", url, "--prepare.image-size", "64"],
    ):
        subprocess.run(
            [sys.executable, "-m", *words],
            cwd=CHECKOUT,
            env={**own, **s3_environ},
            check=True,
            capture_output=True,
            timeout=300,
        )
    return url
