"""No patient is in two splits, nobody moves, and the audit counts what a split by image leaks."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from pneumo.config import SplitConfig
from pneumo.dataset.source import Finding, Study
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import (
    SPLITS,
    LeakageAudit,
    Split,
    assign_groups,
    check_shard_balance,
    clustered_fraction,
    read_salt,
    save_salt,
    split_studies,
)
from pneumo.errors import SourceError
from tests import present
from tests.examples import examples

pytestmark = pytest.mark.processors

FINDINGS: tuple[Finding, ...] = ("Lung Opacity", "Normal", "No Lung Opacity / Not Normal")


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def make_studies(patients: Sequence[int], findings: Sequence[int] | None = None) -> list[Study]:
    """A study for each entry of `patients`; findings take turns unless given."""
    return [
        Study(
            key=hashed(f"study {i}"),
            patient=hashed(f"patient {patient}"),
            url=f"{i}.dcm",
            target=int((findings[i] if findings else i % 3) == 0),
            finding=FINDINGS[findings[i] if findings else i % 3],
            boxes=(),
        )
        for i, patient in enumerate(patients)
    ]


def members(split: Split, studies: Sequence[Study]) -> dict[str, set[str]]:
    """Patients by split."""
    found: dict[str, set[str]] = {name: set() for name in SPLITS}
    for study in studies:
        found[split.by_key[study.key]].add(study.patient)
    return found


fractions = st.builds(
    SplitConfig, val_fraction=st.floats(0.1, 0.4), test_fraction=st.floats(0.1, 0.4)
)
graphs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), min_size=60, max_size=200)


@examples(40)
@given(graphs, fractions, st.integers(0, 2**31 - 1))
def test_no_patient_is_in_two_splits_and_every_study_in_one(
    graph: list[tuple[int, int]], config: SplitConfig, seed: int
) -> None:
    studies = make_studies([p for p, _ in graph], [f for _, f in graph])
    try:
        split = split_studies(studies, config, seed=seed, has_patients=True)
    except SourceError as error:
        assume("would have no" not in str(error))
        raise
    patients = members(split, studies)
    assert sum(len(group) for group in patients.values()) == len({s.patient for s in studies})
    assert set(split.by_key) == {study.key for study in studies}
    assert split.audit.shared_patients == 0
    assert split.audit.patients == {name: len(group) for name, group in patients.items()}
    assert split.audit.studies == {n: list(split.by_key.values()).count(n) for n in SPLITS}
    positives = Counter(split.by_key[s.key] for s in studies if s.target)
    assert split.audit.positives == {name: positives[name] for name in SPLITS}
    for name, interval in split.audit.prevalence.items():
        assert interval.value == positives[name] / split.audit.studies[name]
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1), st.integers(1, 400))
def test_a_patient_stays_in_place_as_studies_are_added(seed: int, added: int) -> None:
    first = make_studies([i // 2 for i in range(300)])
    more = make_studies([i // 2 for i in range(300)] + [i % 250 for i in range(added)])
    chosen = split_studies(first, SplitConfig(), seed=seed, has_patients=True).audit.salt
    config = SplitConfig(salt=chosen)
    before = split_studies(first, config, seed=seed, has_patients=True).by_key
    after = split_studies(more, config, seed=seed, has_patients=True).by_key
    assert {key: after[key] for key in before} == before


def test_the_split_depends_on_seed_and_salt_and_not_on_the_order() -> None:
    studies = make_studies([i // 3 for i in range(600)])

    def split(seed: int, salt: int | None = None, *, reverse: bool = False) -> Split:
        ordered = studies[::-1] if reverse else studies
        config = SplitConfig(salt=salt)
        return split_studies(ordered, config, seed=seed, has_patients=True)

    assert split(1).by_key == split(1, reverse=True).by_key
    assert split(1).audit == split(1, reverse=True).audit
    assert split(1).by_key != split(2).by_key
    assert split(1).by_key == split(1, split(1).audit.salt).by_key
    assert split(1, 0).by_key != split(1, 1).by_key
    assert split(1, 5).audit.salt == 5


def test_the_chosen_salt_balances_better_than_most() -> None:
    studies = make_studies([i // 2 for i in range(600)])

    def imbalance(salt: int | None) -> float:
        split = split_studies(studies, SplitConfig(salt=salt), seed=0, has_patients=True)
        got = Counter((split.by_key[s.key], s.finding) for s in studies)
        return max(abs(got[n, f] / 200 - 0.15) / 0.15 for n in ("val", "test") for f in FINDINGS)

    chosen = imbalance(None)
    assert chosen == min(imbalance(salt) for salt in range(64))
    assert chosen < 0.2


@pytest.mark.parametrize("seed", range(12))
def test_few_studies_are_split_if_any_salt_can(seed: int) -> None:
    """One patient alone has the last finding, so every salt is as wrong as can be in that."""
    studies = make_studies([i // 2 for i in range(38)], [i % 2 for i in range(36)] + [2, 2])

    def works(salt: int | None) -> bool:
        try:
            split_studies(studies, SplitConfig(salt=salt), seed=seed, has_patients=True)
        except SourceError:
            return False
        return True

    assert works(None) == any(works(salt) for salt in range(64))


@pytest.mark.parametrize(("val", "test"), [(0.15, 0.15), (0.1, 0.3), (0.4, 0.4)])
def test_shares_are_near_the_wanted_ones(val: float, test: float) -> None:
    config = SplitConfig(val_fraction=val, test_fraction=test)
    placed = Counter(assign_groups([str(i) for i in range(20_000)], config, 3, 1).values())
    # Four standard deviations of a binomial share.
    for name, share in (("val", val), ("test", test), ("train", 1 - val - test)):
        assert abs(placed[name] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_a_larger_share_moves_patients_out_of_train_only() -> None:
    patients = [str(i) for i in range(3000)]
    few, many = (assign_groups(patients, SplitConfig(val_fraction=v), 0, 0) for v in (0.1, 0.2))
    moved = {(few[patient], many[patient]) for patient in patients}
    assert ("val", "train") not in moved
    assert ("val", "test") not in moved
    assert ("train", "test") in moved


def test_the_salt_is_remembered_beside_the_source_for_the_same_question(tmp_path: Path) -> None:
    config, source_url = SplitConfig(), str(tmp_path)
    assert read_salt(source_url, config, seed=0) is None
    assert save_salt(source_url, config, seed=0, salt=17)
    assert save_salt(source_url, config, seed=1, salt=5)
    assert read_salt(source_url, config, seed=0) == 17
    assert read_salt(source_url, config, seed=1) == 5
    assert read_salt(source_url, SplitConfig(val_fraction=0.2), seed=0) is None
    assert read_salt(source_url, SplitConfig(unit="image"), seed=0) is None
    for text in ("{", '{"patient val 0.15 test 0.15 seed 0": 99}'):
        (tmp_path / ".pneumo" / "split_salts.json").write_text(text)
        with pytest.raises(SourceError, match=r"split_salts\.json: .*delete the file"):
            read_salt(source_url, config, seed=0)


def test_where_nothing_can_be_written_the_salt_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / ".pneumo").write_text("a file where the folder would be")
    assert not save_salt(str(tmp_path / ".pneumo"), SplitConfig(), seed=0, salt=1)


# --- lists ----------------------------------------------------------------------------------------


def test_a_list_decides_and_leaves_out_who_is_not_on_it() -> None:
    studies = make_studies([i // 2 for i in range(60)], [i // 2 % 2 for i in range(60)])
    listed = {s.key: SPLITS[i // 2 % 3] for i, s in enumerate(studies[:48])}
    config = SplitConfig(list="sha256:abc")
    split = split_studies(studies, config, seed=0, has_patients=True, listed=listed)
    assert split.by_key == listed
    assert (split.audit.unlisted, split.audit.list_digest, split.audit.salt) == (
        12,
        "sha256:abc",
        None,
    )
    by_patient = {s.patient: SPLITS[i // 2 % 3] for i, s in enumerate(studies[:48])}
    assert split_studies(studies, config, seed=0, has_patients=True, listed=by_patient).by_key == (
        listed
    )


def test_a_list_that_divides_a_patient_needs_a_word() -> None:
    studies = make_studies([i // 2 for i in range(60)])
    listed = {s.key: SPLITS[(i + i // 3) % 3] for i, s in enumerate(studies)}
    with pytest.raises(SourceError, match=r"puts 30 patients into two splits; use --split\.unit"):
        split_studies(studies, SplitConfig(), seed=0, has_patients=True, listed=listed)
    audit = split_studies(
        studies, SplitConfig(unit="image"), seed=0, has_patients=True, listed=listed
    ).audit
    assert audit.shared_patients == 30
    trained_on = {s.patient for s in studies if listed[s.key] == "train"}
    val = [s.patient for s in studies if listed[s.key] == "val"]
    leaked = sum(patient in trained_on for patient in val) / len(val)
    assert audit.leaked_by_image == leaked
    assert f"{leaked:.0%} of the val studies have their patient in train, and 30" in str(
        audit.warning
    )


def test_a_patient_in_val_and_test_leaks_nothing_into_train() -> None:
    studies = make_studies([i // 2 for i in range(60)])
    listed = {s.key: "train" if i < 40 else ("val", "test")[i % 2] for i, s in enumerate(studies)}
    audit = split_studies(
        studies, SplitConfig(unit="image"), seed=0, has_patients=True, listed=listed
    ).audit
    assert (audit.leaked_by_image, audit.shared_patients) == (0.0, 10)


def test_a_list_of_another_data_set_is_refused() -> None:
    studies = make_studies(range(30))
    with pytest.raises(SourceError, match="names none of the source's studies"):
        split_studies(studies, SplitConfig(), seed=0, has_patients=True, listed={"x": "val"})


# --- the audit ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 8).map(str), st.integers(0, 1)), min_size=1, max_size=60))
def test_an_interval_of_a_share_holds_the_share(pairs: list[tuple[str, int]]) -> None:
    interval = clustered_fraction(pairs)
    assert interval.value == sum(target for _, target in pairs) / len(pairs)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    if len(pairs) < 30:
        assert interval.high - interval.low > 0.1, "few studies say little"


def test_studies_of_one_patient_are_no_new_evidence() -> None:
    alone = [(str(i), int(i % 4 == 0)) for i in range(400)]
    tenfold = [pair for pair in alone for _ in range(10)]
    one, ten = clustered_fraction(alone), clustered_fraction(tenfold)
    assert ten.low == pytest.approx(one.low, abs=2e-3)
    assert ten.high == pytest.approx(one.high, abs=2e-3)
    exact = binomtest(100, 400).proportion_ci(method="exact")
    assert (one.low, one.high) == pytest.approx((exact.low, exact.high), abs=2e-4)


@pytest.mark.parametrize("samples", [16, 1024])
def test_a_skewed_shard_fails_and_shuffled_ones_pass(samples: int) -> None:
    rng = np.random.default_rng(0)
    targets = (rng.uniform(size=26 * samples) < 0.225).astype(int)

    def cut(ordered: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        return [(len(part), int(part.sum())) for part in np.split(ordered, 26)]

    ranges = check_shard_balance({"train": cut(targets), "val": cut(targets[::-1])})
    low, high = ranges["train"]
    assert low <= targets.mean() <= high
    with pytest.raises(SourceError, match=r"split val: shard \d+ has \d+ positives of .*shuffled"):
        check_shard_balance({"train": cut(targets), "val": cut(np.sort(targets))})


def test_a_split_without_patients_is_refused() -> None:
    with pytest.raises(
        SourceError, match=r"patients are unknown.*use --split\.unit image.*mappings_2018"
    ):
        split_studies(make_studies(range(300)), SplitConfig(), seed=0, has_patients=False)


def test_a_split_by_image_reports_what_it_leaks() -> None:
    studies = make_studies([i // 4 for i in range(800)])
    config = SplitConfig(unit="image")
    split = split_studies(studies, config, seed=0, has_patients=True)
    splits_of: dict[str, set[str]] = defaultdict(set)
    for study in studies:
        splits_of[study.patient].add(split.by_key[study.key])
    val = [study for study in studies if split.by_key[study.key] == "val"]
    leaked = sum("train" in splits_of[study.patient] for study in val)
    assert split.audit.unit == "image"
    assert split.audit.leaked_by_image == leaked / len(val)
    assert leaked / len(val) > 0.9
    assert split.audit.shared_patients == sum(len(where) > 1 for where in splits_of.values())
    assert split.audit.shared_patients > 0


def test_a_split_by_patient_reports_what_one_by_image_would_have_leaked() -> None:
    alone = make_studies(range(600))
    split = split_studies(alone, SplitConfig(), seed=0, has_patients=True)
    assert split.audit.leaked_by_image == 0.0
    pairs = make_studies([i // 2 for i in range(4000)])
    leaked = split_studies(pairs, SplitConfig(), seed=0, has_patients=True).audit.leaked_by_image
    assert leaked == pytest.approx(0.70, abs=0.08), "the other image is in train 70 % of the time"


def test_an_image_split_without_patients_knows_no_leak() -> None:
    config = SplitConfig(unit="image")
    audit = split_studies(make_studies(range(300)), config, seed=0, has_patients=False).audit
    assert (audit.leaked_by_image, audit.shared_patients, audit.patients) == (None, None, None)


def test_what_is_written_of_an_audit_carries_its_warning() -> None:
    studies = make_studies([i // 2 for i in range(600)])
    for unit in ("patient", "image"):
        audit = split_studies(studies, SplitConfig(unit=unit), seed=0, has_patients=True).audit
        written = json.loads(audit.model_dump_json())
        assert written["warning"] == audit.warning
        assert (audit.warning is None) == (unit == "patient")
        assert LeakageAudit.model_validate(written) == audit


@pytest.mark.parametrize(
    ("patients", "findings"),
    [
        ([0], [0]),
        ([0] * 300, [0, 1, 2] * 100),
        (range(300), [0] * 300),
        (range(300), [1] * 300),
        (range(6), [0, 1] * 3),
    ],
    ids=["one", "one patient", "all positive", "all negative", "few"],
)
def test_a_set_that_cannot_be_split_is_refused(
    patients: Sequence[int], findings: list[int]
) -> None:
    studies = make_studies(patients, findings)
    message = r"split (train|val|test) would have no (positive|negative) study .*--split fractions"
    with pytest.raises(SourceError, match=message) as caught:
        split_studies(studies, SplitConfig(salt=0), seed=0, has_patients=True)
    assert f"({len(studies)} studies in all)" in str(caught.value)


def test_no_studies_at_all_are_refused() -> None:
    with pytest.raises(SourceError, match="no studies, so nothing to split"):
        split_studies([], SplitConfig(), seed=0, has_patients=True)


def test_all_of_rsna(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "rsna-metadata").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "stage_2_train_images").mkdir()
    source = read_source(str(tmp_path), {"PNEUMO_HASH_KEY": "a secret of the tests"})
    audit = split_studies(source.studies, SplitConfig(), seed=0, has_patients=True).audit
    print(audit.model_dump_json(indent=1))
    assert audit.shared_patients == 0
    assert sum(present(audit.patients).values()) == 11_439
    assert audit.leaked_by_image is not None
    assert 0.66 < audit.leaked_by_image < 0.74
    for name in SPLITS:
        assert audit.prevalence[name].value == pytest.approx(0.2253, abs=0.005)
    everyone = clustered_fraction([(s.patient, s.target) for s in source.studies])
    # The standard error is 0.0053 by patient (a bootstrap says 0.0052), and 0.0025 by image.
    assert (everyone.high - everyone.low) / 2 / 1.96 == pytest.approx(0.0053, abs=1e-4)
