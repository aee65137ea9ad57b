"""Which settings of training help, from scratch: patient-grouped 5-fold over seeds.

    python -m tests.benchmarks.recipes [--source rsna-mini|rsna-1k|phantoms] [--seeds 3]
        [--image-size 64] [--epochs 30] [--batch-size 16] [--only base,ema] [--weights RUN]
        [--precision auto] [--processes 2] [--stores DIR] [--out recipes.jsonl]

Every patient is in one of five folds, the same for all variants and seeds. For each fold a network
is trained on three others, its epoch is chosen on the fourth, and the fold itself is scored once.
`base` is the recipe `baseline` with random weights at the given size and batch; a variant changes
one thing of it, `best` is the recipe of that name, and `transfer` begins with the weights of
`--weights`. That run must know none of the patients: prepare its store with `--prepare.without`
64px-fold-0,64px-fold-1 of `--stores`, where the folds' stores are kept. Told are, per variant, the
mean AUROC over folds and seeds, its standard deviation over seeds, and the difference to `base` in
pairs of equal fold and seed with its standard error over the pairs. Without the real X-rays beside
the checkout the source is phantoms. Runs that stand in `--out` already are not done again.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

from pneumo.config import Config
from pneumo.config_layers import override, read_recipe
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.preparation import find_store, finish_store
from pneumo.dataset.shard_plans import digest_settings, plan_shards
from pneumo.dataset.shard_tasks import prepare_shard
from pneumo.dataset.shards import shard_samples
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import split_studies
from pneumo.evaluation import metrics
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import open_loader
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model
from pneumo.network.scoring import score
from pneumo.training.callbacks import Callbacks
from pneumo.training.checkpoints import find_weights, load_checkpoint, read_index
from pneumo.training.fit import fit
from tests.benchmarks.sources import find_real_data

FOLDS = 5
REFERENCE, TRANSFER = "base", "transfer"
STRONG = {
    "augment.rotation_degrees": 15.0,
    "augment.translation_fraction": 0.1,
    "augment.scale_fraction": 0.2,
    "augment.gray_fraction": 0.3,
}
COSINE = {"train.schedule": "cosine", "train.warmup_fraction": 0.1}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "lr 3e-4": {"train.lr": 3e-4},
    "lr 1e-3": {"train.lr": 1e-3},
    "cosine": COSINE,
    "cosine 3e-4": {**COSINE, "train.lr": 3e-4},
    "cosine 1e-3": {**COSINE, "train.lr": 1e-3},
    "cosine 3e-4 ema": {**COSINE, "train.lr": 3e-4, "train.ema_decay": 0.99},
    "pos_weight 1": {"train.pos_weight": 1.0},
    "pos_weight balanced": {"train.pos_weight": "balanced"},
    "no augmentation": dict.fromkeys(STRONG, 0.0),
    "strong augmentation": STRONG,
    "ema": {"train.ema_decay": 0.99},
    "adamw 0.05": {"train.optimizer": "adamw", "train.weight_decay": 0.05},
    "clip 1": {"train.clip_norm": 1.0},
    "twice the batch": {},
}
"""All but `best` and `transfer`."""


@dataclass(frozen=True)
class Run:
    """One network: a variant, a fold, a seed."""

    variant: str
    fold: int
    seed: int
    image_size: int
    epochs: int
    batch_size: int
    source: str
    precision: str
    weights: str


# --- folds ----------------------------------------------------------------------------------------


def assign_folds(source: Path) -> dict[str, int]:
    """The fold of each image id."""
    mapping = json.loads(next(source.glob("*mappings*.json")).read_text())
    patient = {row["subset_img_id"]: row["img_id"].split("_")[0] for row in mapping}
    with next(source.glob("*labels.csv")).open() as file:
        target = {row["patientId"]: int(row["Target"]) for row in csv.DictReader(file)}
    ids = sorted(target)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    classes, groups = [target[i] for i in ids], [patient[i] for i in ids]
    parts = splitter.split(np.zeros(len(ids)), classes, groups)
    return {ids[row]: fold for fold, (_, rows) in enumerate(parts) for row in rows}


def make_stores(source: Path, folder: Path, image_size: int) -> list[str]:
    """A store a fold, whose test is the fold and whose val is the next one."""
    config = override(Config(), {"prepare.image_size": image_size, "split.named": "hash"})
    found, fold_of = read_source(str(source), settings=config.prepare), assign_folds(source)
    fold_of_key = {study.key: fold_of[Path(study.url).stem] for study in found.studies}
    stores = []
    for fold in range(FOLDS):
        names = {fold: "test", (fold + 1) % FOLDS: "val"}
        listed = {key: names.get(one, "train") for key, one in fold_of_key.items()}
        split = split_studies(
            found.studies, config.split, seed=0, has_patients=found.has_patients, listed=listed
        )
        store = str(folder / f"{image_size}px-fold-{fold}")
        if find_store(store, found, config) is None:
            per_shard, digest = shard_samples(image_size), digest_settings(config)
            plans = plan_shards(found.studies, split.by_key, seed=0, samples_per_shard=per_shard)
            shards = [
                prepare_shard(plan, store, image_size, digest, found.file_key) for plan in plans
            ]
            finish_store(store, found, shards, split.audit, config, phantoms=False)
        stores.append(store)
    return stores


# --- one run --------------------------------------------------------------------------------------


def configure(run: Run) -> Config:
    """`baseline` from scratch, changed as the variant says; `best` is the recipe."""
    recipe = "best" if run.variant == "best" else "baseline"
    config = override(Config(), read_recipe(recipe), f"recipe {recipe}")
    batch_size = run.batch_size * (2 if run.variant == "twice the batch" else 1)
    fixed = {
        "seed": run.seed,
        "model.weights": run.weights,
        "train.precision": run.precision,
        "data.image_size": run.image_size,
        "train.epochs": run.epochs,
        "train.batch_size": batch_size,
        "train.micro_batch_size": batch_size,  # BatchNorm over the whole batch, as in `baseline`
        "train.keep_checkpoints": 1,
    }
    return find_weights(override(config, {**fixed, **VARIANTS.get(run.variant, {})}))


def train_and_score(run: Run, store: str) -> dict[str, Any]:
    """Train, choose the epoch on val, score the fold once."""
    torch.set_num_threads(1)
    config, started = configure(run), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        history = fit(
            config,
            store_url=store,
            run_url=folder,
            world=World(),
            device=torch.device("cpu"),
            callbacks=Callbacks(),
        )
        best = read_index(folder).best
        checkpoint = load_checkpoint(folder, best)
    model = build_model(config.model.backbone)
    model.load_state_dict(checkpoint.scored_model)
    model.to(memory_format=torch.channels_last)
    manifest = read_manifest(store)
    source = PreparedStore(store, manifest, config.data)
    test = open_loader(source, "test", world=World(), device="cpu")
    scores = score(model, test.evaluation(batch_size=64))
    return {
        **asdict(run),
        "auroc": metrics.auroc(scores.targets, scores.logits),
        "val_auroc": best.val_auroc,
        "epoch": best.epoch,
        "train_loss": history[-1]["train/loss"],
        "seconds": time.perf_counter() - started,
    }


# --- the table ------------------------------------------------------------------------------------


def tabulate(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a variant, best first."""
    by_variant: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        by_variant[row["variant"]][row["fold"], row["seed"]] = row["auroc"]
    yield f"| variant | AUROC | sd over seeds | − {REFERENCE} | standard error | runs |"
    yield "|---|---|---|---|---|---|"
    order = sorted(by_variant, key=lambda name: -statistics.fmean(by_variant[name].values()))
    for name in order:
        found = by_variant[name]
        seeds: dict[int, list[float]] = defaultdict(list)
        for (_, seed), value in found.items():
            seeds[seed].append(value)
        means = [statistics.fmean(values) for values in seeds.values()]
        spread = f"{statistics.stdev(means):.3f}" if len(means) > 1 else ""
        pairs = [found[k] - v for k, v in by_variant.get(REFERENCE, {}).items() if k in found]
        gain = error = ""
        if name != REFERENCE and len(pairs) > 1:
            gain = f"{statistics.fmean(pairs):+.3f}"
            error = f"{statistics.stdev(pairs) / math.sqrt(len(pairs)):.3f}"
        mean = statistics.fmean(found.values())
        yield f"| {name} | {mean:.3f} | {spread} | {gain} | {error} | {len(found)} |"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed; `only` is a list of variants, all of them by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--source", choices=["rsna-mini", "rsna-1k", "phantoms"], default="rsna-mini"
    )
    parser.add_argument("--studies", type=int, default=400, help="phantoms to draw")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="few studies make few steps")
    parser.add_argument("--only", help="variants, by comma; `best` is the recipe")
    parser.add_argument("--precision", choices=["auto", "bfloat16"], default="auto")
    parser.add_argument("--weights", help="a run, for the variant `transfer`")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stores", type=Path, help="keep the folds' stores here")
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    options = parser.parse_args(argv)
    options.only = options.only.split(",") if options.only else list(VARIANTS)
    names = [*VARIANTS, "best", *([TRANSFER] if options.weights else [])]
    if unknown := set(options.only) - set(names):
        parser.error(
            f"--only: no variant {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = read_options(argv)
    real = None if options.source == "phantoms" else find_real_data(options.source)
    kind = "phantoms" if real is None else options.source
    asked = (options.image_size, options.epochs, options.batch_size, kind, options.precision)
    runs = [
        Run(name, fold, seed, *asked, options.weights if name == TRANSFER else "random")
        for seed in range(options.seeds)
        for name in options.only
        for fold in range(FOLDS)
    ]
    done = [json.loads(line) for line in _lines(options.out)]
    known = {tuple(row[field] for field in Run.__dataclass_fields__) for row in done}
    left = [run for run in runs if tuple(asdict(run).values()) not in known]
    with tempfile.TemporaryDirectory(prefix="pneumo-recipes-") as temporary:
        folder = options.stores or Path(temporary)
        source = folder / f"source-{options.source}"  # with the stores: it has their secret
        source.mkdir(parents=True, exist_ok=True)
        if real is not None:
            for path in real.iterdir():
                (source / path.name).unlink(missing_ok=True)
                (source / path.name).symlink_to(path)
        else:
            write_phantoms(source, num_studies=options.studies, seed=5, num_processes=None)
        stores = make_stores(source, folder, options.image_size) if left else []
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            pending = [pool.submit(train_and_score, run, stores[run.fold]) for run in left]
            for future in pending:
                row = future.result()
                with options.out.open("a") as file:
                    file.write(f"{json.dumps(row)}\n")
                done.append(row)
                what = f"{row['variant']:<22} fold {row['fold']} seed {row['seed']}"
                print(f"{what}  {row['auroc']:.3f}", flush=True)
    fields = ("image_size", "epochs", "batch_size", "source", "precision")
    shown = [row for row in done if tuple(row[field] for field in fields) == asked]
    sizes = f"{options.image_size} px, {options.epochs} epochs, batches of {options.batch_size}"
    print(f"\n{kind}, {sizes}")
    for line in tabulate(shown):
        print(line)
    return 0


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
