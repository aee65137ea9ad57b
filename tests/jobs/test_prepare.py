import contextlib
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pydicom
import pytest
import ray

from jobs import prepare
from pneumo.dataset.manifest import find_manifest, read_manifest
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.study_table import StudyRow, read_studies
from tests.benchmarks.sources import write_linked_source
from tests.identifiers import Identifiers
from tests.jobs.conftest import NUM_STUDIES, Prepared


def run(source: Path, store: Path, *flags: str) -> int:
    return prepare.main(
        ["--source", str(source), "--store", str(store), "--prepare.image-size", "64", *flags]
    )


def copy_source(prepared: Prepared, folder: Path) -> Path:
    return Path(shutil.copytree(prepared.source, folder / "source"))


def read_store(store: Path) -> dict[str, StudyRow]:
    """What is known of the store's studies, by key."""
    return read_studies(str(store), read_manifest(str(store)))


def test_the_manifest_counts_what_lies_in_the_shards(prepared: Prepared) -> None:
    manifest = read_manifest(str(prepared.store))
    assert sum(entry.samples for entry in manifest.splits.values()) == NUM_STUDIES
    assert manifest.quarantined == {}
    assert manifest.audit.shared_patients == 0
    for entry in manifest.splits.values():
        for shard in entry.shards:
            with tarfile.open(prepared.store / shard.name) as tar:
                names = tar.getnames()
            assert sum(name.endswith(".npy") for name in names) == shard.samples
            assert sum(name.endswith(".cls") for name in names) == shard.samples


def test_targets_and_boxes_are_those_of_the_tables(prepared: Prepared) -> None:
    studies = read_store(prepared.store)
    with (prepared.source / "stage_2_train_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    positives = {row["patientId"] for row in rows if row["Target"] == "1"}
    assert sum(row.target for row in studies.values()) == len(positives)
    boxes = sum(len(row.boxes) for row in studies.values())
    assert boxes == sum(row["Target"] == "1" for row in rows)
    for row in studies.values():
        for box in row.boxes:  # of 1024 pixels in the tables, of 64 in the store
            assert 0 <= box.x < box.x + box.width <= 64.01
            assert 0 <= box.y < box.y + box.height <= 64.01


PRIVATE = {
    "PatientName": "Doe^Jane^Quincy",
    "PatientBirthDate": "19530417",
    "OtherPatientIDs": "MRN-77341902",
    "PatientAddress": "17 Elm Street, Springfield",
    "AccessionNumber": "ACC20931177",
    "InstitutionName": "St. Nowhere General",
    "ReferringPhysicianName": "Grey^Meredith",
    "StudyDate": "20140611",
    "StudyTime": "101533.221",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1111",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.2222",
    "StudyDescription": "Chest portable, room 4711",
    "DeviceSerialNumber": "SN-5550123",
}


def test_nothing_of_the_source_can_be_named_in_what_is_written_or_said(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    files = sorted((source / "stage_2_train_images").glob("*.dcm"))
    for path in files:
        dataset = pydicom.dcmread(path)
        for keyword, value in PRIVATE.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    identifiers = Identifiers.of(source)
    assert set(PRIVATE.values()) < identifiers.texts
    assert len(identifiers.texts) > 3 * NUM_STUDIES
    assert identifiers.find_in(source), "they are found where they are"
    # Some files are bad: what is said of them?
    files[0].write_bytes(files[0].read_bytes()[:9000])
    files[1].write_bytes(b"")
    files[2].unlink()
    files[3].unlink()
    files[3].mkdir()
    failed, store = tmp_path / "failed", tmp_path / "store"
    assert run(source, failed) == 1
    assert (failed / "parts" / "quarantine.jsonl").is_file()
    assert run(source, store, "--prepare.max-bad-fraction", "0.1", "--debug") == 0
    said = capfd.readouterr()
    assert "quarantined" in said.out
    workers = ray_logs()
    assert list(workers.glob("worker-*"))
    assert identifiers.find_in(failed, store, workers, said.out, said.err) == []


def ray_logs() -> Path:
    """Where this cluster's workers write what they print."""
    return Path(ray._private.worker.global_worker.node.get_logs_dir_path())


def test_the_same_source_gives_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    source = copy_source(prepared, tmp_path)
    assert run(source, tmp_path / "again") == 0
    first, again = read_manifest(str(prepared.store)), read_manifest(str(tmp_path / "again"))
    assert first == again


def test_a_second_run_has_nothing_to_do_and_another_setting_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    before = (prepared.store / "manifest.json").stat().st_mtime_ns
    assert run(source, prepared.store) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert run(source, prepared.store, "--seed", "9") == 2
    assert "give another --store" in capsys.readouterr().err
    assert (prepared.store / "manifest.json").stat().st_mtime_ns == before


def test_a_store_in_the_sources_own_folder_is_refused(
    kaggle_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kaggle_folder(num_studies=4)
    assert run(folder, folder) == 2
    assert "is the source's own folder" in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()


def test_bad_files_are_listed_with_a_reason_and_capped(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    files = sorted((source / "stage_2_train_images").glob("*.dcm"))
    files[0].write_bytes(b"")
    files[1].write_bytes(b"no DICOM" * 100)
    files[2].write_bytes(files[2].read_bytes()[:20_000])
    files[3].unlink()
    store = tmp_path / "store"
    assert run(source, store) == 1
    error = capsys.readouterr().err
    assert f"4 of {NUM_STUDIES} studies cannot be used" in error
    assert "missing 1" in error
    assert find_manifest(str(store)) is None  # nothing half-made is taken for whole
    assert run(source, store, "--prepare.max-bad-fraction", "0.1") == 0
    manifest = read_manifest(str(store))
    assert sum(manifest.quarantined.values()) == 4
    assert sum(entry.samples for entry in manifest.splits.values()) == NUM_STUDIES - 4
    listed = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in listed)[:2] == ["missing", "no_pixels"]
    assert not any(path.stem in (store / "quarantine.jsonl").read_text() for path in files[:4])
    said = capsys.readouterr().err
    assert run(source, store, "--prepare.max-bad-fraction", "0.1") == 0
    again = capsys.readouterr().err
    assert "holds a store of these tables and settings; nothing to do" in again
    assert "can be used now" not in said + again
    shutil.copy(files[4], files[3])
    assert run(source, store) == 0
    assert "a study that was quarantined then can be used now" in capsys.readouterr().err
    assert read_manifest(str(store)) == manifest


def test_files_that_come_back_give_the_store_of_an_undisturbed_run(
    prepared: Prepared, tmp_path: Path
) -> None:
    source, store = copy_source(prepared, tmp_path), tmp_path / "store"
    files = sorted((source / "stage_2_train_images").glob("*.dcm"))[:5]
    for path in files:
        path.rename(tmp_path / path.name)
    assert run(source, store) == 1
    for path in files:
        (tmp_path / path.name).rename(path)
    assert run(source, store) == 0
    assert content(store) == content(prepared.store)


def test_a_source_without_the_mapping_needs_a_word(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    next(source.glob("*mappings*.json")).unlink()
    assert run(source, tmp_path / "store") == 2
    assert "--split.unit image" in capsys.readouterr().err
    assert run(source, tmp_path / "store", "--split.unit", "image") == 0
    said = capsys.readouterr()
    assert "every metric will be too good" in said.err
    assert " studies " in said.out
    assert "patients" not in said.out
    written = json.loads((tmp_path / "store" / "manifest.json").read_text())
    audit = written["audit"]
    assert (audit["unit"], audit["leaked_by_image"]) == ("image", None)
    assert "every metric will be too good" in audit["warning"]
    assert (audit["patients"], audit["shared_patients"]) == (None, None)
    assert {split["patients"] for split in written["splits"].values()} == {None}
    assert written["duplicates"]["across_patients"] is None
    assert read_manifest(str(tmp_path / "store")).model_dump(mode="json") == written


def test_a_taste_puts_nobody_elsewhere(prepared: Prepared, tmp_path: Path) -> None:
    source = copy_source(prepared, tmp_path)
    assert run(source, tmp_path / "taste", "--prepare.limit", "60") == 0
    taste, whole = read_store(tmp_path / "taste"), read_store(prepared.store)
    assert len(taste) == 60
    assert {key: row.split for key, row in taste.items()} == {
        key: whole[key].split for key in taste
    }


def test_a_taste_is_of_those_that_have_a_place(prepared: Prepared, tmp_path: Path) -> None:
    source = copy_source(prepared, tmp_path)
    splits = {key: row.split for key, row in read_store(prepared.store).items()}
    studies = read_source(str(source)).studies
    in_train = [study for study in studies if splits[study.key] == "train"]
    left_out = {study.key for study in in_train[::2]}
    some = [study for study in studies if study.key not in left_out]
    rows = "".join(f"{Path(study.url).stem},{splits[study.key]}\n" for study in some)
    (tmp_path / "list.csv").write_text(f"patientId,split\n{rows}")
    listed = ("--split.list", str(tmp_path / "list.csv"))
    assert run(source, tmp_path / "taste", *listed, "--prepare.limit", str(len(some) - 4)) == 0
    assert len(read_store(tmp_path / "taste")) == len(some) - 4
    assert run(source, tmp_path / "all", *listed, "--prepare.limit", str(len(some) + 4)) == 0
    assert set(read_store(tmp_path / "all")) == {study.key for study in some}


def test_studies_that_come_later_move_nobody(prepared: Prepared, tmp_path: Path) -> None:
    source = copy_source(prepared, tmp_path)
    (source / ".pneumo" / "split_salts.json").unlink()
    labels = source / "stage_2_train_labels.csv"
    lines = labels.read_text().splitlines()
    some = {line.split(",")[0] for line in lines[1:]}
    some = set(sorted(some)[:60])
    labels.write_text(
        "\n".join([lines[0], *(row for row in lines[1:] if row.split(",")[0] in some)]) + "\n"
    )
    assert run(source, tmp_path / "first") == 0
    labels.write_text("\n".join(lines) + "\n")
    assert run(source, tmp_path / "later") == 0
    first, later = read_store(tmp_path / "first"), read_store(tmp_path / "later")
    assert (len(first), len(later)) == (60, NUM_STUDIES)
    assert all(later[key].split == row.split for key, row in first.items())
    salt = read_manifest(str(tmp_path / "first")).audit.salt
    assert read_manifest(str(tmp_path / "later")).audit.salt == salt


def test_a_published_split_is_reproduced(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    mapping = json.loads(next(source.glob("*mappings*.json")).read_text())
    patients = sorted({row["img_id"].split("_")[0] for row in mapping})
    wanted = {p: ("train", "val", "test")[i % 3] for i, p in enumerate(patients[:-2])}
    table = tmp_path / "split.csv"
    table.write_text("patient,split\n" + "".join(f"{p},{s}\n" for p, s in wanted.items()))
    assert run(source, tmp_path / "store", "--split.list", str(table)) == 0
    left_out = sum(row["img_id"].split("_")[0] in patients[-2:] for row in mapping)
    assert f"{left_out} studies are not on the list" in capsys.readouterr().out
    manifest = read_manifest(str(tmp_path / "store"))
    assert manifest.audit.unlisted == left_out
    assert manifest.audit.patients == Counter(wanted.values())
    assert str(table) not in (tmp_path / "store" / "manifest.json").read_text()
    assert run(source, tmp_path / "store", "--split.list", str(table)) == 0  # nothing to do
    table.write_text(table.read_text().replace(",val", ",test", 1))
    assert run(source, tmp_path / "store", "--split.list", str(table)) == 2


# --- at once, killed, on any number of workers ----------------------------------------------------

PREPARE = """
import sys
import ray
from jobs import prepare
memory = {"_memory": int(sys.argv[2])} if int(sys.argv[2]) else {}
ray.init(num_cpus=int(sys.argv[1]), log_to_driver=False, **memory)
sys.exit(prepare.main(sys.argv[3:]))
"""


def flags(source: Path, store: Path) -> list[str]:
    size = ("--prepare.image-size", "64")
    return ["--source", str(source), "--store", str(store), *size]


def content(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def many(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """600 studies, and the store that one undisturbed worker makes of them."""
    folder = tmp_path_factory.mktemp("many")
    files = sorted((prepared.source / "stage_2_train_images").glob("*.dcm"))
    source = write_linked_source(folder / "source", files, num_studies=600)
    start(flags(source, folder / "store"), cpus=1).wait()
    assert (folder / "store" / "manifest.json").exists()
    return Prepared(source, folder / "store")


def start(arguments: list[str], *, cpus: int, memory: int = 0) -> subprocess.Popen[bytes]:
    """The job on a cluster of so many CPUs, and bytes of memory if not as many as there are."""
    sizes = (str(cpus), str(memory))
    return subprocess.Popen([sys.executable, "-c", PREPARE, *sizes, *arguments])


@pytest.mark.slow
def test_one_worker_and_eight_give_the_same_bytes(many: Prepared, tmp_path: Path) -> None:
    assert start(flags(many.source, tmp_path / "eight"), cpus=8).wait() == 0
    assert content(tmp_path / "eight") == content(many.store)


@pytest.mark.slow
def test_a_node_with_less_memory_than_a_task_asks_for_does_them_one_by_one(
    many: Prepared, tmp_path: Path
) -> None:
    job = start(flags(many.source, tmp_path / "small"), cpus=2, memory=200_000_000)
    assert job.wait() == 0
    assert content(tmp_path / "small") == content(many.store)


@pytest.mark.slow
def test_two_jobs_at_once_make_one_store(many: Prepared, tmp_path: Path) -> None:
    store = tmp_path / "store"
    jobs = [start(flags(many.source, store), cpus=2) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert content(store) == content(many.store)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_killed_at_any_moment_goes_on(many: Prepared, tmp_path: Path) -> None:
    """In turns the driver alone, and the whole tree of its processes."""
    rng = random.Random(os.environ.get("TEST_SEED", "moments"))
    store = tmp_path / "store"
    reused: list[int] = []
    for _ in range(int(os.environ.get("TEST_KILLS", "2"))):
        wanted = rng.randrange(1, 5)  # of 18 shards
        job = start(flags(many.source, store), cpus=2)
        before = len(list(store.glob("parts/*/*.json")))
        while job.poll() is None and len(list(store.glob("parts/*/*.json"))) < before + wanted:
            time.sleep(0.01)
        assert job.poll() is None, "it was killed while it worked"
        kill(job, whole=bool(len(reused) % 2))
        assert not (store / "manifest.json").exists()
        reused.append(len(list(store.glob("parts/*/*.json"))))
    assert start(flags(many.source, store), cpus=2).wait() == 0
    assert content(store) == content(many.store)
    print(f"records found after each kill: {reused}")
    assert reused[-1] > 0


def kill(job: subprocess.Popen[bytes], *, whole: bool) -> None:
    """SIGKILL for the job and all its processes, or for the job alone: its own Ray processes must
    then end by themselves, or are ended here."""
    children = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    for process in children if whole else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)


KILL_ITSELF = """
import os, sys
import psutil
from jobs import prepare
fsync, left = os.fsync, [int(sys.argv[1])]
def die_at_the_last(descriptor):
    left[0] -= 1
    if not left[0]:  # the disk has half of it
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os.kill(os.getpid(), 9)
    fsync(descriptor)
os.fsync = die_at_the_last
sys.exit(prepare.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_killed_while_it_finishes_goes_on(prepared: Prepared, tmp_path: Path) -> None:
    """At each write of the driver's: the claim, the quarantine, the table, the manifest."""
    job = flags(prepared.source, tmp_path / "plain")
    subprocess.run([sys.executable, "-m", "jobs.prepare", *job], check=True)
    left = []
    for number in range(1, 10):
        store = tmp_path / str(number)
        job = [sys.executable, "-c", KILL_ITSELF, str(number), *flags(prepared.source, store)]
        done = subprocess.run(job, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9
        left.append(sorted(path.name for path in store.rglob(".partial-*")))
        assert not (store / "manifest.json").exists()
        assert run_small(prepared.source, store) == 0
        assert content(store) == content(tmp_path / "plain")
    print(f"unfinished files after each kill: {left}")
    assert len(left) >= 4
    assert all(left), "the kill came in the middle of a write"


def run_small(source: Path, store: Path) -> int:
    return prepare.main(flags(source, store))
