"""One task's work can be done by anybody, any number of times, and leaves the same bytes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import s3fs
from blake3 import blake3
from fsspec.implementations.memory import MemoryFileSystem

from pneumo import storage
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.overlap import KNOWN_PICTURES, KnownStudies
from pneumo.dataset.preparation import (
    can_use_rejected,
    check_shards_are_there,
    find_store,
    finish_store,
)
from pneumo.dataset.shard_plans import ShardPlan, digest_settings, estimate_memory, plan_shards
from pneumo.dataset.shard_tasks import ShardRecord, prepare_shard
from pneumo.dataset.shards import read_shard, sample_bytes, shard_samples
from pneumo.dataset.source import Source
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import SPLITS, Split, audit_split, split_studies
from pneumo.dataset.study_keys import derive_file_key
from pneumo.dataset.study_table import read_studies
from pneumo.errors import AccessError, BadFilesError, SourceError, StoreError
from tests.conftest import draw_chest, without_root

FolderMaker = Callable[..., Path]
DicomMaker = Callable[..., bytes]

ENVIRON = {"PNEUMO_HASH_KEY": "a secret of the tests"}
CONFIG = override(Config(), {"prepare.image_size": 32, "split.salt": 3})


class Preparation:
    """A source with its plans, as jobs.prepare would have it."""

    def __init__(self, folder: Path, config: Config = CONFIG, samples_per_shard: int = 8) -> None:
        self.folder, self.config = folder, config
        self.source: Source = read_source(str(folder), ENVIRON)
        self.split: Split = split_studies(
            self.source.studies, config.split, seed=config.seed, has_patients=True
        )
        self.plans = self.plan(self.split.by_key, samples_per_shard)
        self.parts: dict[str, ShardRecord] = {}

    def plan(self, by_key: Mapping[str, str], samples_per_shard: int = 8) -> list[ShardPlan]:
        return plan_shards(
            self.source.studies,
            by_key,
            seed=self.config.seed,
            samples_per_shard=samples_per_shard,
        )

    def file(self, plan: ShardPlan, number: int = 0) -> Path:
        return Path(plan.studies[number].url)

    def do(
        self, plan: ShardPlan, store: Path | str, known: KnownStudies | None = None
    ) -> tuple[int, int]:
        """Studies rejected, shards reused."""
        size = self.config.prepare.image_size
        digest, key = digest_settings(self.config), self.source.file_key
        part = prepare_shard(plan, str(store), size, digest, key, known)
        self.parts[plan.name] = part
        return len(part.rejected), int(part.reused)

    def finish(self, store: Path | str) -> Manifest:
        parts = list(self.parts.values())
        random.shuffle(parts)
        return finish_store(str(store), self.source, parts, self.split.audit, self.config)

    def run(self, store: Path) -> Manifest:
        return self.run_at(str(store))

    def run_at(self, store: str, *, claimed: bool = False) -> Manifest:
        if not claimed:
            assert find_store(store, self.source, self.config) is None
        for plan in self.plans:
            self.do(plan, store)
        return self.finish(store)


@pytest.fixture
def preparation(kaggle_folder: FolderMaker) -> Preparation:
    return Preparation(kaggle_folder(num_studies=120))


def content(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def record_of(plan: ShardPlan, store: Path) -> ShardRecord:
    return ShardRecord.model_validate_json((store / plan.record).read_bytes())


# --- the same bytes -------------------------------------------------------------------------------


def test_a_finished_store_holds_nothing_else(preparation: Preparation, tmp_path: Path) -> None:
    manifest = preparation.run(tmp_path)
    names = {shard.name for entry in manifest.splits.values() for shard in entry.shards}
    assert set(content(tmp_path)) == names | {
        "manifest.json",
        "studies.parquet",
        "quarantine.jsonl",
        "secret_check.txt",
    }
    assert not (tmp_path / "parts").exists()


def test_files_of_others_are_not_removed(preparation: Preparation, tmp_path: Path) -> None:
    others = {f"{split}/{name}.tar": b"mine" for split in SPLITS for name in ("a", "000001")}
    others |= {f"parts/{name}": b"mine" for name in ("thesis.docx", "train/1.json", "a/claim.json")}
    for name, data in others.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    preparation.run(tmp_path)
    assert others.items() <= content(tmp_path).items()


@pytest.mark.parametrize("seed", range(4))
def test_order_repetition_and_interruption_change_no_byte(
    preparation: Preparation, tmp_path: Path, seed: int
) -> None:
    preparation.run(tmp_path / "plain")
    rng = random.Random(seed)
    other = tmp_path / "other"
    calls = preparation.plans * 2
    rng.shuffle(calls)
    for plan in calls:
        damage = rng.choice(
            ["none", "none", "none", "no record", "no shard", "cut", "cut record", "changed"]
        )
        preparation.do(plan, other)
        shard = other / preparation.parts[plan.name].entry.name
        record = other / plan.record
        if damage == "no record":
            record.unlink()
        elif damage == "no shard":
            shard.unlink()
        elif damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-512])
        elif damage == "cut record":
            record.write_text(record.read_text()[:-20])
        elif damage == "changed":
            shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    reused = sum(preparation.do(plan, other)[1] for plan in preparation.plans)
    assert 0 < reused < len(preparation.plans)
    preparation.finish(other)
    assert content(other) == content(tmp_path / "plain")


def test_several_at_once_on_one_store_change_no_byte(
    preparation: Preparation, tmp_path: Path
) -> None:
    preparation.run(tmp_path / "plain")
    other = tmp_path / "other"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda plan: preparation.do(plan, other), preparation.plans * 4))
    preparation.finish(other)
    assert content(other) == content(tmp_path / "plain")


def test_a_whole_shard_is_not_made_again(preparation: Preparation, tmp_path: Path) -> None:
    plan = preparation.plans[0]
    assert preparation.do(plan, tmp_path) == (0, 0)
    for study in plan.studies:
        Path(study.url).unlink()
    assert preparation.do(plan, tmp_path) == (0, 1)


def take_away(path: Path) -> None:
    path.rename(path.with_suffix(".away"))


def cut_off(path: Path) -> None:
    """A download under way."""
    path.rename(path.with_suffix(".away"))
    path.write_bytes(path.with_suffix(".away").read_bytes()[:-500])


def make_unreadable(path: Path) -> None:
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path.name)


@pytest.mark.parametrize("spoil", [take_away, cut_off, make_unreadable])
def test_files_that_come_back_are_tried_again(
    preparation: Preparation, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    preparation.run(tmp_path / "plain")
    files = [preparation.file(preparation.plans[0], i) for i in (0, 1)]
    files.append(preparation.file(preparation.plans[-1]))
    for path in files:
        spoil(path)
    other = tmp_path / "other"
    with pytest.raises(BadFilesError, match=r"3 of 120 studies .* and repeat the command"):
        preparation.run(other)
    with pytest.raises(BadFilesError, match="3 of 120 studies"):
        preparation.run(other)
    for path in files:
        path.with_suffix(".away").replace(path)
    done = [preparation.do(plan, other) for plan in preparation.plans]
    assert done == [(0, 0), *[(0, 1)] * (len(done) - 2), (0, 0)]
    preparation.finish(other)
    assert content(other) == content(tmp_path / "plain")


@pytest.mark.parametrize("late", ["writes before the other ends", "writes after it"])
def test_a_job_that_finds_more_files_takes_nothing_from_another(
    preparation: Preparation, tmp_path: Path, late: str
) -> None:
    """Both have begun; what one could not read is there when the other comes to it."""
    path = preparation.file(preparation.plans[0])
    first, second = preparation, Preparation(preparation.folder)
    assert find_store(str(tmp_path), first.source, CONFIG) is None
    assert find_store(str(tmp_path), second.source, CONFIG) is None
    take_away(path)
    for plan in first.plans:
        first.do(plan, tmp_path)
    path.with_suffix(".away").replace(path)

    def do_all() -> None:
        for plan in second.plans:
            second.do(plan, tmp_path)

    if late == "writes before the other ends":
        do_all()
    manifest = first.finish(tmp_path)
    assert manifest.quarantined == {"missing": 1}
    if late == "writes after it":
        do_all()
    assert second.finish(tmp_path) == manifest
    shards = [shard for entry in manifest.splits.values() for shard in entry.shards]
    samples = sum(len(list(read_shard(str(tmp_path), shard, 32))) for shard in shards)
    assert samples == len(first.source.studies) - 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tar")} == {
        shard.name for shard in shards
    }


def test_a_finished_store_that_lost_a_shard_is_not_called_finished(
    preparation: Preparation, tmp_path: Path
) -> None:
    manifest = preparation.run(tmp_path)
    check_shards_are_there(str(tmp_path), manifest)
    (tmp_path / manifest.splits["val"].shards[0].name).unlink()
    with pytest.raises(StoreError, match=r"1 of the finished store's .* are missing; delete it"):
        check_shards_are_there(str(tmp_path), manifest)


def test_a_finished_store_knows_what_could_be_used_by_now(
    preparation: Preparation, tmp_path: Path
) -> None:
    path = preparation.file(preparation.plans[0])
    take_away(path)
    config = override(CONFIG, {"prepare.max_bad_fraction": 0.05})
    manifest = Preparation(preparation.folder, config).run(tmp_path)
    assert not can_use_rejected(str(tmp_path), manifest, preparation.source)
    path.with_suffix(".away").replace(path)
    assert can_use_rejected(str(tmp_path), manifest, preparation.source)


def test_a_receipt_for_something_else_is_not_believed(
    preparation: Preparation, tmp_path: Path
) -> None:
    plan = preparation.plans[0]
    preparation.do(plan, tmp_path)
    for changes in ({"prepare.image_size": 48}, {"seed": 9}, {"split.salt": 4}):
        other = Preparation(preparation.folder, override(CONFIG, changes))
        assert other.do(plan, tmp_path) == (0, 0)
    fewer = ShardPlan(plan.split, plan.name, plan.studies[1:])
    assert preparation.do(fewer, tmp_path) == (0, 0)


def test_bad_files_may_be_more_without_doing_all_again(preparation: Preparation) -> None:
    other = override(CONFIG, {"prepare.max_bad_fraction": 0.5})
    assert digest_settings(other) == digest_settings(CONFIG)
    assert digest_settings(override(CONFIG, {"seed": 1})) != digest_settings(CONFIG)


@pytest.mark.parametrize(
    ("image_size", "largest"),
    [(224, 300), (1024, 25)],  # of small pictures eight shards at least
)
def test_a_task_needs_memory_for_its_largest_shard_twice(
    preparation: Preparation, image_size: int, largest: int
) -> None:
    studies = [
        replace(study, key=f"{copy}/{study.key}")
        for copy in range(20)
        for study in preparation.source.studies
    ]
    by_key = {study.key: "train" for study in studies}
    plans = plan_shards(studies, by_key, seed=0, samples_per_shard=shard_samples(image_size))
    assert max(len(plan.studies) for plan in plans) == largest
    memory = estimate_memory(plans, image_size)
    assert memory == 384 * 2**20 + 2 * largest * sample_bytes(image_size)


@pytest.mark.parametrize("samples_per_shard", [1, 7, 64, 1024])
def test_plans_hold_every_study_once_in_shards_of_a_size(
    preparation: Preparation, samples_per_shard: int
) -> None:
    source, split = preparation.source, preparation.split
    plans = preparation.plan(split.by_key, samples_per_shard)
    keys = [study.key for plan in plans for study in plan.studies]
    assert sorted(keys) == sorted(study.key for study in source.studies)
    sizes = {len(plan.studies) for plan in plans if plan.split == "train"}
    assert max(sizes) <= samples_per_shard
    assert max(sizes) - min(sizes) <= 1
    for name in SPLITS:
        members = [len(plan.studies) for plan in plans if plan.split == name]
        assert len(members) <= 8 or len(members) % 8 == 0 or set(members) == {1}
        assert min(members) > 0
    assert all(split.by_key[study.key] == plan.split for plan in plans for study in plan.studies)


def test_settings_of_a_store_of_before_are_the_same_settings() -> None:
    """The digest that stores had when `samples_per_shard` was a setting too."""
    assert digest_settings(Config()) == (
        "cbb5194941c1042975f478d1de93d84ea82282f2e38d3c3e734c0104e452f23b"
    )


def test_preparing_needs_no_torch() -> None:
    """Each worker of a cluster would import it: seconds, and memory that is not there for it."""
    code = "import sys; import jobs.preparation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- whose store it is ----------------------------------------------------------------------------


def test_an_unfinished_store_of_other_settings_is_left_alone(
    preparation: Preparation, tmp_path: Path
) -> None:
    assert find_store(str(tmp_path), preparation.source, CONFIG) is None
    assert find_store(str(tmp_path), preparation.source, CONFIG) is None
    with pytest.raises(StoreError, match="with other settings is running there, or was interr"):
        find_store(str(tmp_path), preparation.source, override(CONFIG, {"seed": 1}))


def test_a_finished_store_of_other_settings_is_left_alone(
    preparation: Preparation, tmp_path: Path
) -> None:
    manifest = preparation.run(tmp_path)
    assert find_store(str(tmp_path), preparation.source, CONFIG) == manifest
    with pytest.raises(StoreError, match="holds a store of another source or of other settings"):
        find_store(str(tmp_path), preparation.source, override(CONFIG, {"seed": 1}))


class Overtaken(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory; something else happens just before a claim is laid or read."""

    protocol = "overtaken"
    before_claim: ClassVar[list[Callable[[], object]]] = []
    before_reading: ClassVar[list[Callable[[], object]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("overtaken://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if path.endswith("claim.json") and self.before_claim:
            self.before_claim.pop()()
        super().pipe_file(path, value, mode=mode, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        if path.endswith("claim.json") and self.before_reading:
            self.before_reading.pop()()
        data: bytes = super().cat_file(path, **kwargs)
        return data


fsspec.register_implementation("overtaken", Overtaken)


def test_a_job_that_finishes_while_another_looks_is_not_overwritten(
    preparation: Preparation, tmp_path: Path
) -> None:
    store = f"overtaken://{tmp_path}"
    Overtaken.before_claim.append(lambda: preparation.run_at(store))
    with pytest.raises(StoreError, match="holds a store of another source or of other settings"):
        find_store(store, preparation.source, override(CONFIG, {"seed": 1}))
    assert not storage.exists(f"{store}/parts"), "its claim is given back"
    manifest = read_manifest(store)
    assert find_store(store, preparation.source, CONFIG) == manifest


def test_a_job_that_finishes_between_looks_is_believed_if_it_did_the_same(
    preparation: Preparation, tmp_path: Path
) -> None:
    store = f"overtaken://{tmp_path}"
    Overtaken.before_claim.append(lambda: preparation.run_at(store))
    assert find_store(store, preparation.source, CONFIG) == read_manifest(store)


def test_a_job_that_comes_late_leaves_the_finished_store_as_it_is(
    preparation: Preparation, tmp_path: Path
) -> None:
    """Though it could not read what the other could."""
    path = preparation.file(preparation.plans[0])
    late = Preparation(preparation.folder)
    take_away(path)
    for plan in late.plans:
        late.do(plan, tmp_path)
    path.with_suffix(".away").replace(path)
    for plan in preparation.plans:
        preparation.do(plan, tmp_path)
    manifest = preparation.finish(tmp_path)
    before = content(tmp_path)
    assert late.finish(tmp_path) == manifest
    assert content(tmp_path) == before


def test_a_claim_that_is_given_up_while_it_is_read_is_no_failure(
    preparation: Preparation, tmp_path: Path
) -> None:
    store = f"overtaken://{tmp_path}"
    assert find_store(store, preparation.source, CONFIG) is None
    Overtaken.before_reading.append(lambda: preparation.run_at(store, claimed=True))
    assert find_store(store, preparation.source, CONFIG) == read_manifest(store)


# --- what the manifest says -----------------------------------------------------------------------


def test_statistics_are_those_of_the_stored_pixels(
    preparation: Preparation, tmp_path: Path
) -> None:
    preparation.run(tmp_path)
    manifest = read_manifest(str(tmp_path))
    pixels = {
        name: np.stack(
            [
                sample.pixels
                for shard in entry.shards
                for sample in read_shard(str(tmp_path), shard, 32)
            ]
        )
        for name, entry in manifest.splits.items()
    }
    for study in preparation.source.studies[:5]:
        file_key = derive_file_key(ENVIRON["PNEUMO_HASH_KEY"].encode())
        file_blake3 = blake3(Path(study.url).read_bytes(), key=file_key).hexdigest()
        assert read_studies(str(tmp_path), manifest)[study.key].source_blake3 == file_blake3
    whole = audit_split(
        preparation.source.studies,
        preparation.split.by_key,
        CONFIG.split,
        seed=CONFIG.seed,
        salt=preparation.split.audit.salt,
        has_patients=True,
    )
    assert manifest.audit.model_copy(update={"shard_prevalence": {}}) == whole
    assert manifest.mean == pytest.approx(float(pixels["train"].mean() / 255), abs=1e-6)
    assert manifest.std == pytest.approx(float(pixels["train"].std() / 255), abs=1e-6)
    for name, entry in manifest.splits.items():
        assert list(entry.histogram) == np.bincount(pixels[name].ravel(), minlength=256).tolist()
        low, high = manifest.audit.shard_prevalence[name]
        assert low <= entry.positives / entry.samples <= high
    rows = read_studies(str(tmp_path), manifest).values()
    assert len(rows) == manifest.splits["train"].samples + sum(
        manifest.splits[name].samples for name in ("val", "test")
    )


def test_equal_pictures_are_counted(kaggle_folder: FolderMaker, tmp_path: Path) -> None:
    folder = kaggle_folder(num_studies=60, images_per_patient=1)
    first, *others = sorted((folder / "stage_2_train_images").iterdir())
    for path in others[:9]:
        path.write_bytes(first.read_bytes())
    # The phantoms that carry no box are equal to begin with.
    manifest = Preparation(folder).run(tmp_path / "store")
    before = manifest.duplicates
    rows = list(read_studies(str(tmp_path / "store"), manifest).values())
    groups = {
        row.pixels_digest: [r for r in rows if r.pixels_digest == row.pixels_digest] for row in rows
    }
    several = [group for group in groups.values() if len(group) > 1]
    assert before.pictures == len(several)
    assert before.studies == sum(map(len, several)) >= 10
    assert before.across_splits == sum(len({row.split for row in g}) > 1 for g in several) > 0


def test_headers_and_tables_that_disagree_are_counted(
    kaggle_folder: FolderMaker, tmp_path: Path, make_dicom: DicomMaker
) -> None:
    folder = kaggle_folder(num_studies=120)
    files = sorted((folder / "stage_2_train_images").iterdir())
    for path in files[:4]:  # two pairs of files in each other's place
        path.write_bytes(make_dicom(draw_chest(64), identifier="another"))
    labels = folder / "stage_2_train_labels.csv"
    lines = labels.read_text().splitlines()
    positive = next(i for i, line in enumerate(lines) if line.endswith(",1"))
    image_id = lines[positive].split(",")[0]
    lines[positive] = f"{image_id},60.0,1.0,9.0,9.0,1"
    other = next(i for i, line in enumerate(lines) if line.endswith(",1") and i > positive + 2)
    other_id = lines[other].split(",")[0]
    lines = [line for line in lines if not line.startswith(other_id)] + [f"{other_id},,,,,1"]
    labels.write_text("\n".join(lines) + "\n")
    (files[0].parent / "a-file-of-nobody.dcm").write_bytes(b"")
    manifest = Preparation(folder).run(tmp_path)
    assert manifest.contradictions == {"box_outside": 1, "no_box": 1, "patient_id": 4}
    assert manifest.unlabelled == 1


# --- what cannot be used --------------------------------------------------------------------------


def after_removal(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """`make`, called for a path after what is there was removed."""

    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def test_every_way_of_being_unusable_has_its_code(
    kaggle_folder: FolderMaker, make_dicom: DicomMaker, folder_without_root: Path
) -> None:
    gray = np.full((64, 64), 90, np.uint8)
    palette = {"PhotometricInterpretation": "UNKNOWN"}
    bad: dict[str, Callable[[Path], object]] = {
        "not_dicom": lambda path: path.write_bytes(b""),
        "not_dicom ": lambda path: path.write_bytes(b"\x89PNG" * 500),
        "no_pixels": lambda path: path.write_bytes(make_dicom(gray, elements={"PixelData": None})),
        "no_pixels ": lambda path: path.write_bytes(make_dicom(gray)[:-4200]),
        "photometric": lambda path: path.write_bytes(make_dicom(gray, elements=palette)),
        "multi_frame": lambda path: path.write_bytes(make_dicom(np.stack([gray] * 3))),
        "wrong_class": lambda path: path.write_bytes(
            make_dicom(gray, elements={"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"})
        ),
        "too_large": lambda path: path.write_bytes(
            make_dicom(gray, elements={"Rows": 65535, "Columns": 65535})
        ),
        "undecodable": lambda path: path.write_bytes(make_dicom(gray, elements={"Rows": 70})),
        "missing": lambda path: path.unlink(),
        "missing ": after_removal(lambda path: path.symlink_to("nothing")),
        "unreadable": after_removal(lambda path: path.symlink_to(path.name)),
        "unreadable ": after_removal(lambda path: path.mkdir()),
        "unreadable  ": lambda path: path.chmod(0),
        "unreadable   ": after_removal(os.mkfifo),
    }
    config = override(CONFIG, {"prepare.max_bad_fraction": 0.2})
    source, store = folder_without_root / "source", folder_without_root / "store"
    shutil.copytree(kaggle_folder(num_studies=120), source)
    store.mkdir()
    preparation = Preparation(source, config, samples_per_shard=60)
    plan = preparation.plans[0]
    assert plan.split == "train"
    for number, spoil in enumerate(bad.values()):
        spoil(preparation.file(plan, number))
    with without_root(folder_without_root):
        assert preparation.do(plan, store) == (len(bad), 0)
    record = record_of(plan, store)
    found = {item.key: item.reason for item in record.rejected}
    expected = {plan.studies[i].key: name.strip() for i, name in enumerate(bad)}
    assert found == expected
    for study in plan.studies:
        image_id = Path(study.url).stem
        assert not any(image_id in item.message for item in record.rejected)


class Late(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory that come late, in any order; after `allowed` reads access is refused."""

    protocol = "late"
    lock: ClassVar[threading.Lock] = threading.Lock()
    under_way: ClassVar[int] = 0
    most: ClassVar[int] = 0
    asked: ClassVar[int] = 0
    allowed: ClassVar[float] = math.inf

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("late://")))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        with Late.lock:
            Late.asked += 1
            Late.under_way += 1
            Late.most = max(Late.most, Late.under_way)
            refused = Late.asked > Late.allowed
        try:
            time.sleep(random.random() / 50)
            if refused:
                raise PermissionError("the bucket is closed")
            data: bytes = super().cat_file(path, **kwargs)
            return data
        finally:
            with Late.lock:
                Late.under_way -= 1

    def exists(self, path: str, **kwargs: Any) -> bool:
        return Late.asked <= Late.allowed and bool(super().exists(path, **kwargs))


fsspec.register_implementation("late", Late)


def test_files_of_a_bucket_are_read_while_others_are_decoded(
    preparation: Preparation, tmp_path: Path
) -> None:
    """A bucket answers late, in any order, and not always: the shard is the disk's."""
    one, other = preparation.plans[:2]
    plan = replace(one, studies=one.studies + other.studies)
    preparation.file(plan, 5).unlink()
    assert preparation.do(plan, tmp_path / "from_disk") == (1, 0)
    bucket = f"late://{tmp_path.name}"
    for study in plan.studies:
        if Path(study.url).exists():
            storage.write_bytes(f"{bucket}/{Path(study.url).name}", Path(study.url).read_bytes())
    away = tuple(replace(s, url=f"{bucket}/{Path(s.url).name}") for s in plan.studies)
    Late.most, Late.asked, Late.allowed = 0, 0, math.inf
    assert preparation.do(replace(plan, studies=away), tmp_path / "from_bucket") == (1, 0)
    assert content(tmp_path / "from_bucket") == content(tmp_path / "from_disk")
    assert 4 <= Late.most <= 8
    # All of it is over before an error is raised, and nothing more is asked for.
    Late.asked, Late.allowed = 0, 3
    with pytest.raises(AccessError):
        preparation.do(replace(plan, studies=away), tmp_path / "broken")
    assert Late.under_way == 0
    assert Late.asked <= 3 + 8 + 8
    assert not list((tmp_path / "broken").rglob("*.tar"))


def test_a_bucket_that_refuses_is_told_without_the_names_of_its_files(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    plan = preparation.plans[0]
    away = tuple(
        replace(study, url=f"s3://rsna/images/{Path(study.url).name}") for study in plan.studies
    )
    with pytest.raises(AccessError, match=f"no credentials for study {away[0].key};") as caught:
        preparation.do(replace(plan, studies=away), tmp_path)
    told = "".join(traceback.format_exception(caught.value))
    assert not [study for study in away if Path(study.url).stem in told]


def test_too_many_bad_files_fail_and_are_told(preparation: Preparation, tmp_path: Path) -> None:
    for number in range(3):
        preparation.file(preparation.plans[0], number).unlink()
    with pytest.raises(BadFilesError, match=r"3 of 120 studies cannot be used \(missing 3\), more"):
        preparation.run(tmp_path)
    assert storage.exists(str(tmp_path / "parts"))
    kept = Preparation(preparation.folder, override(CONFIG, {"prepare.max_bad_fraction": 0.05}))
    assert sum(kept.do(plan, tmp_path)[1] for plan in kept.plans) == len(kept.plans)
    manifest = kept.finish(tmp_path)
    assert manifest.quarantined == {"missing": 3}
    # The audit is of what the store holds, not of what was to go into it.
    assert manifest.audit.studies == {n: e.samples for n, e in manifest.splits.items()}
    assert manifest.audit.positives == {n: e.positives for n, e in manifest.splits.items()}
    assert manifest.audit.patients == {n: e.patients for n, e in manifest.splits.items()}


def test_bad_files_are_a_share_of_what_the_list_names(
    preparation: Preparation, tmp_path: Path
) -> None:
    listed = {
        study.key: preparation.split.by_key[study.key] for study in preparation.source.studies
    }
    named = dict(list(listed.items())[:60])
    preparation.split = split_studies(
        preparation.source.studies, CONFIG.split, seed=0, has_patients=True, listed=named
    )
    preparation.config = override(CONFIG, {"prepare.max_bad_fraction": 0.04})
    preparation.plans = preparation.plan(named)
    for number in range(3):
        preparation.file(preparation.plans[0], number).unlink()
    with pytest.raises(BadFilesError, match="3 of 60 studies cannot be used"):
        preparation.run(tmp_path)


def test_contradictory_studies_count_as_bad(kaggle_folder: FolderMaker, tmp_path: Path) -> None:
    folder = kaggle_folder(num_studies=120)
    classes = folder / "stage_2_detailed_class_info.csv"
    classes.write_text(classes.read_text().replace(",Normal", ",Lung Opacity", 1))
    config = override(CONFIG, {"prepare.max_bad_fraction": 0.01})
    manifest = Preparation(folder, config).run(tmp_path)
    assert manifest.quarantined == {"contradiction": 1}
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert line["message"] == "class 'Lung Opacity' with Target 0"


def test_a_split_that_lost_a_class_is_refused(preparation: Preparation, tmp_path: Path) -> None:
    val = [plan for plan in preparation.plans if plan.split == "val"]
    for plan in val:
        for study in plan.studies:
            if study.target:
                Path(study.url).unlink()
    config = override(CONFIG, {"prepare.max_bad_fraction": 0.9})
    with pytest.raises(SourceError, match="split val: only one class is left after quarantine"):
        Preparation(preparation.folder, config).run(tmp_path)


def test_a_shard_of_bad_files_alone_is_no_shard(preparation: Preparation, tmp_path: Path) -> None:
    plan = next(p for p in preparation.plans if p.split == "train")
    for study in plan.studies:
        Path(study.url).write_bytes(b"")
    config = override(CONFIG, {"prepare.max_bad_fraction": 0.5})
    manifest = Preparation(preparation.folder, config).run(tmp_path)
    names = {shard.name for shard in manifest.splits["train"].shards}
    assert not any(name.startswith(plan.name) for name in names)
    assert not list(tmp_path.glob(f"{plan.name}*"))
    shutil.rmtree(preparation.folder)


def test_pictures_that_another_store_trains_on_are_left_out_and_counted(
    preparation: Preparation, tmp_path: Path
) -> None:
    preparation.run(tmp_path / "first")
    rows = list(
        read_studies(str(tmp_path / "first"), read_manifest(str(tmp_path / "first"))).values()
    )
    # Of the negatives many have one picture.
    digests = frozenset([row.pixels_digest for row in rows if row.target][:3])
    known = KnownStudies(frozenset(), digests, ())
    for plan in preparation.plans:
        preparation.do(plan, tmp_path / "second", known)
    manifest = preparation.finish(tmp_path / "second")
    left = read_studies(str(tmp_path / "second"), manifest)
    left_out = {row.key for row in rows if row.pixels_digest in digests}
    assert len(left_out) >= 3
    assert left.keys() == {row.key for row in rows} - left_out
    assert manifest.left_out == {KNOWN_PICTURES: len(left_out)}
    assert sum(manifest.audit.studies.values()) == len(left)
    assert manifest.quarantined == {}
