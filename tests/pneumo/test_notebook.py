"""What a notebook imports from `pneumo`, and the notebook in docs/, run as a person runs it."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import pneumo
from pneumo.dataset.study_keys import PRIVATE_FOLDER
from pneumo.errors import RunError, SourceError, StoreError
from pneumo.network.scoring import Member
from pneumo.notebook import Model
from tests.networks import TinyNetwork

WALKTHROUGH = Path(__file__).parents[2] / "docs" / "walkthrough.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_walkthrough_runs_and_shows_what_it_kept(tmp_path: Path) -> None:
    kept = nbformat.read(WALKTHROUGH, as_version=4)
    book = nbformat.read(WALKTHROUGH, as_version=4)
    (training,) = [cell for cell in book.cells if "pneumo.fit(" in cell.source]
    book.cells.append(nbformat.v4.new_code_cell(training.source))  # as by "Run all" once more
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *code, again = [cell for cell in book.cells if cell.cell_type == "code"]
    assert "trained before" in str(again.outputs)
    before = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [has_picture(cell) for cell in code] == [has_picture(cell) for cell in before]
    assert sum(map(has_picture, code)) == 3
    assert "test AUROC" in str(code[4].outputs)
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) < 60
    assert WALKTHROUGH.stat().st_size < 300_000
    assert not re.search(r"/(home|Users)/\w|/root/", WALKTHROUGH.read_text())


def has_picture(cell: nbformat.NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("name", pneumo.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(pneumo, name))
    assert text is not None
    examples = doctest.DocTestParser().get_examples(text)
    assert examples
    for example in examples:
        compile(example.source, name, "exec")
        if example.want:
            assert repr(eval(example.source, {"pneumo": pneumo})) == example.want.strip()


def test_importing_pneumo_loads_nothing_heavy() -> None:
    shown = "import sys, pneumo; dir(pneumo); print('torch' in sys.modules, 'cv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    assert set(pneumo.__all__) <= set(dir(pneumo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pneumo.nothing


def test_a_script_without_a_main_block_draws_phantoms(tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    call = "pneumo.write_phantoms(Path(sys.argv[1]), num_studies=40, seed=1)"
    script.write_text(f"import sys\nfrom pathlib import Path\nimport pneumo\n{call}\n")
    folder = tmp_path / "phantoms"
    subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, check=True)
    assert len(list(folder.rglob("*.dcm"))) == 40


def test_a_store_that_is_there_is_opened(tmp_path: Path) -> None:
    pneumo.write_phantoms(tmp_path / "source", num_studies=60, seed=2, num_processes=1)
    config = pneumo.Config.model_validate({"prepare": {"image_size": 32}})
    made = pneumo.prepare_store(tmp_path / "source", tmp_path / "store", config)
    again = pneumo.prepare_store(tmp_path / "source", tmp_path / "store", config)
    opened = pneumo.open_store(tmp_path / "store")
    assert made.manifest.digest == again.manifest.digest == opened.manifest.digest
    assert made.manifest.phantoms
    chosen = [*opened.split("test")[:2], *opened.split("val")[:2], opened.split("test")[3]]
    pictures = opened.pictures(chosen)
    assert [picture.shape for picture in pictures] == [(32, 32)] * 5
    np.testing.assert_array_equal(pictures[4], opened.pictures(chosen[4:])[0])
    with pytest.raises(ValueError, match="no split 'valid'; give one of train, val, test"):
        opened.split("valid")

    # Without the patients of its train and val only those of its test are left.
    others = {"image_size": 32, "without": [str(tmp_path / "store")]}
    config = pneumo.Config.model_validate({"prepare": others})
    with pytest.raises(SourceError, match="split train would have no positive study"):
        pneumo.prepare_store(tmp_path / "source", tmp_path / "other", config)
    with pytest.raises(StoreError):
        pneumo.open_store(tmp_path / "nothing")
    with pytest.raises(RunError, match="no checkpoint in it"):
        pneumo.load_model(tmp_path / "nothing")


def test_a_store_is_refused_where_the_job_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store, run = (tmp_path / name for name in ("source", "store", "run"))
    pneumo.write_phantoms(source, num_studies=60, seed=2)
    with pytest.raises(StoreError, match="is the source's own folder"):
        pneumo.prepare_store(source, source)
    assert not (source / PRIVATE_FOLDER).exists()
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "index.json").write_text("{}")
    with pytest.raises(StoreError, match="is a run"):
        pneumo.prepare_store(source, run)
    by_image = {"prepare": {"image_size": 32}, "split": {"unit": "image"}}
    config = pneumo.Config.model_validate(by_image)
    pneumo.prepare_store(source, store, config)
    assert "warning: split by image" in capsys.readouterr().out
    next(store.glob("val/*.tar")).unlink()
    with pytest.raises(StoreError, match="shards are missing"):
        pneumo.prepare_store(source, store, config)


def test_a_model_scores_no_picture_and_more_than_a_batch() -> None:
    model = Model(Member(TinyNetwork(), "resnet18", 32, 0.5, 0.25))
    assert model.logits([]).shape == (0,)
    assert model.maps([]).shape == (0, 32, 32)
    pictures = list(np.random.default_rng(0).integers(0, 256, (65, 32, 32)).astype(np.uint8))
    assert model.logits(pictures).shape == (65,)
    maps = model.maps(pictures)
    assert maps.shape == (65, 32, 32)
    np.testing.assert_allclose(maps[64], model.maps(pictures[64:])[0], atol=1e-4)
