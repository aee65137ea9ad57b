"""One Ray cluster on simulated machines, for all tests of this folder."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.source_folder import write_phantoms
from tests.multinode.faults import (
    BATCH_SIZE,
    EPOCHS,
    MANY_EPOCHS,
    MICRO_BATCH_SIZE,
    TRAINING,
    Cost,
    Record,
    format_table,
    read_records,
)
from tests.multinode.namespaces import Machine, Network, why_not
from tests.multinode.ray_cluster import RayCluster

_COSTS = pytest.StashKey[list[Cost]]()
RUN_TIMEOUT_S = 240.0
BUCKET = "runs"
_S3_PORT = 5000
_S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "only-in-namespaces",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Site:
    """What the tests run on: a Ray cluster, a store and an object store."""

    cluster: RayCluster
    store: Path
    source: Path
    stored_copy: str
    """The URL of the store's copy in the bucket."""
    object_store: Machine
    """Runs an S3 server, and no Ray."""
    small_disk: Path
    """A folder that all machines share, on a file system too small for a run."""

    def train(
        self,
        run: Path | str,
        *flags: str,
        store: str | None = None,
        epochs: int = EPOCHS,
        micro_batch_size: int = MICRO_BATCH_SIZE,
    ) -> tuple[str, ...]:
        """The command for a training in `run`, with up to 16 / `micro_batch_size` workers."""
        places = ("--store", store or str(self.store), "--run", str(run))
        sizes = ("--train.epochs", str(epochs), "--train.micro-batch-size", str(micro_batch_size))
        return ("jobs.train", *places, *TRAINING, *sizes, *flags)

    def fetch(self, key: str) -> str:
        """The text of an object in the bucket."""
        return _use_storage(
            self.object_store, f"print(storage.read_text('s3://{BUCKET}/{key}'), end='')"
        )

    @contextmanager
    def without_object_store(self) -> Iterator[None]:
        """Disconnect it during the block."""
        self.object_store.disconnect()
        try:
            yield
        finally:
            self.object_store.connect()


@dataclass(frozen=True)
class Undisturbed:
    """The run that all others are compared with."""

    records: list[Record]
    """Of its epochs, which are more than those of most other runs."""
    steps_per_epoch: int


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COSTS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    costs = terminalreporter.config.stash[_COSTS]
    if costs:
        terminalreporter.section("faults during a training of two workers")
        for line in format_table(costs):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def small_disk() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="pn-small-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(path)]
    if why_not() is None:
        subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)
        path.rmdir()


@pytest.fixture(scope="session")
def site(small_disk: Path) -> Iterator[Site]:
    """A head, two workers and a machine with an object store; a store prepared by the cluster."""
    if reason := why_not():
        pytest.skip(f"no simulated machines: {reason}")
    folder = Path(
        tempfile.mkdtemp(prefix="pn", dir="/tmp")
    )  # a short path, as there are sockets in it
    source, store = folder / "phantoms", folder / "store"
    write_phantoms(source, num_studies=180, seed=3)
    (source / ".pneumo").mkdir()
    (source / ".pneumo" / "hash_key").write_text("the same split every time")
    try:
        with Network(folder) as network:
            object_store = network.add_machine("object-store")
            endpoint = _start_s3(object_store, folder / "s3.log")
            cluster = RayCluster(network, AWS_ENDPOINT_URL=endpoint, **_S3_KEYS)
            cluster.add_workers(2)
            prepare = ("--prepare.image-size", "64")
            command = ("jobs.prepare", "--source", str(source), "--store", str(store), *prepare)
            with cluster.driver(*command) as driver:
                assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 0, driver.said
            copy = f"s3://{BUCKET}/store"
            _use_storage(
                object_store,
                f"from pathlib import Path; storage.upload_folder(Path('{store}'), '{copy}')",
            )
            yield Site(cluster, store, source, copy, object_store, small_disk)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_workers(site: Site) -> Site:
    """The site with exactly two worker machines, whatever the last test did to them."""
    while len(site.cluster.workers) > 2:
        site.cluster.workers[-1].kill()
    site.cluster.add_workers(2 - len(site.cluster.workers))
    return site


@pytest.fixture(scope="session")
def undisturbed(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    two = ("--cluster.num-workers", "2")
    with site.cluster.driver(*site.train(run, *two, epochs=MANY_EPOCHS)) as driver:
        assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 0, driver.said
    steps_per_epoch = read_manifest(str(site.store)).splits["train"].samples // BATCH_SIZE
    return Undisturbed(read_records(run, MANY_EPOCHS), steps_per_epoch)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[Cost]:
    """The table to which a test adds the cost of its fault."""
    return request.config.stash[_COSTS]


def _use_storage(machine: Machine, script: str) -> str:
    """What a script that uses pneumo's `storage` prints on the object store's machine."""
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{_S3_PORT}"}
    process = machine.start(
        *(sys.executable, "-c", f"from pneumo import storage; {script}"),
        environ={**_S3_KEYS, **endpoint},
        stdout=subprocess.PIPE,
    )
    text = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, script
    return text


def _start_s3(machine: Machine, log: Path) -> str:
    """An S3 server (moto's) with an empty bucket; its endpoint."""
    endpoint = f"http://{machine.address}:{_S3_PORT}"
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **_S3_KEYS}
    with log.open("wb") as out:
        machine.start(
            *(sys.executable, "-m", "moto.server", "--host", "0.0.0.0", "--port", str(_S3_PORT)),
            environ=environ,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    make = (
        "import urllib.request as r; "
        f"r.urlopen(r.Request('{endpoint}/{BUCKET}', method='PUT'), timeout=5)"
    )
    deadline_s = time.monotonic() + 60
    while machine.start(
        sys.executable, "-c", make, environ=environ, stderr=subprocess.DEVNULL
    ).wait():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no S3 server:\n{log.read_text()}")
        time.sleep(0.5)
    return endpoint
