"""That every benchmark still starts: none of them runs in the quick tests."""

import subprocess
import sys
from pathlib import Path

from tests import CHECKOUT


def test_every_benchmark_finds_what_it_imports() -> None:
    names = [
        f"tests.benchmarks.{path.stem}"
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if not path.stem.startswith(("test_", "__"))
    ]
    assert len(names) > 5
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *names],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
