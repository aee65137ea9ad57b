"""Runs the tests marked `processors` as if on several processors, and once on busy cores.

    make test-processors        or        python -m tests.processors [NAME …] [--pytest …]

Numerical libraries choose their instructions by the processor, or by an environment variable that
limits them. So one machine with AVX-512 gives the results of four kinds of processors; a kind that
needs more than the machine has is skipped, and a variable without effect is an error. In each kind
`tests.promised_results` is computed too, and must be the same in all of them.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests import CHECKOUT
from tests.promised_results import write_inputs

# MKL is torch's for matrix products, IPP and the CPU's features are OpenCV's, JSIMD is of
# libjpeg-turbo, and GLIBC of exp, sin and the like, which fuse or do not fuse their sums.
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "OPENBLAS_CORETYPE": "SkylakeX"}
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENCV_CPU_DISABLE": "AVX512-SKX",
    "OPENCV_IPP": "avx2",
}
SSE4 = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Nehalem",
    "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FP16,AVX",
    "OPENCV_IPP": "sse42",
    "JSIMD_FORCESSE2": "1",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",
}


@dataclass(frozen=True)
class Kind:
    """A kind of processor."""

    needs: tuple[str, ...] = ()
    """Capabilities that the machine must have, by the names of torch.cpu.get_capabilities."""
    environ: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Beginnings of the names of numpy's features that are switched off."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Parts of the names that `PROBE` must find, by library."""
    busy: bool = False
    """With a busy process on each core."""


KINDS = {
    "this machine": Kind(),
    "AVX-512, bfloat16": Kind(
        ("avx512_f", "avx512_bf16"),
        AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        (),
        {"torch": "AVX512", "oneDNN": "avx512_core", "bfloat16": "avx512_core_bf16",
         "OpenBLAS": "SkylakeX"},
    ),
    "AVX-512 alone": Kind(
        ("avx512_f",),
        AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
        ("AVX512_ICL", "AVX512_SPR"),
        {"torch": "AVX512", "oneDNN": "avx512_core", "OpenBLAS": "SkylakeX"},
    ),
    "AVX2, Intel": Kind(
        ("avx2", "fma3"),
        AVX2 | {"OPENBLAS_CORETYPE": "Haswell"},
        ("AVX512", "X86_V4"),
        {"torch": "AVX2", "oneDNN": "avx2", "OpenBLAS": "Haswell", "MKL": "AVX2",
         "bfloat16": ""},
    ),
    "AVX2, AMD": Kind(
        ("avx2", "fma3"),
        AVX2 | {"OPENBLAS_CORETYPE": "Zen"},
        ("AVX512", "X86_V4"),
        {"torch": "AVX2", "oneDNN": "avx2", "OpenBLAS": "Zen", "MKL": "AVX2", "bfloat16": ""},
    ),
    "SSE4": Kind(
        ("sse4_2",),
        SSE4,
        ("AVX", "FMA", "F16C", "X86_V3", "X86_V4"),
        {"torch": "DEFAULT", "oneDNN": "sse41", "OpenBLAS": "Nehalem", "numpy": "",
         "bfloat16": ""},
    ),
    "busy cores": Kind(busy=True),
}  # fmt: skip

LIBRARIES = ("torch", "oneDNN", "bfloat16", "MKL", "OpenBLAS", "numpy")
PROBE = """
import json
import cv2, numpy, scipy.linalg, torch
from threadpoolctl import threadpool_info
torch.ones(4, 4) @ torch.ones(4, 4)
convolve, images = torch.nn.Conv2d(16, 16, 3), torch.ones(2, 16, 32, 32)
convolve(images)
with torch.autocast("cpu", torch.bfloat16):
    convolve(images)
print()
print(json.dumps({
    "has": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
    "torch": torch.backends.cpu.get_cpu_capability(),
    "OpenBLAS": " ".join(sorted({i.get("architecture") or "" for i in threadpool_info()})).strip(),
    "numpy": " ".join(numpy.show_config(mode="dicts")["SIMD Extensions"].get("found", [])),
}))
"""


@dataclass
class Outcome:
    """The results of a kind."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def probe(environ: Mapping[str, str]) -> dict[str, str]:
    """The instructions that each library says it uses under `environ`."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **environ, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = done.stdout.strip().splitlines()
    found: dict[str, str] = json.loads(last)
    for key, source in (("oneDNN", "src:f32"), ("bfloat16", "src:bf16")):
        kernels = [
            line.split(",convolution,")[1].split(",")[0].rpartition(":")[2]
            for line in lines
            if ",convolution," in line and source in line
        ]
        found[key] = " ".join(sorted(set(kernels)))
    words = {"AMX": "AMX", "AVX-512": "AVX512", "AVX2": "AVX2", "SSE4.2": "SSE4_2"}
    of_mkl = next((line for line in lines if line.startswith("MKL_VERBOSE oneMKL")), "")
    found["MKL"] = next((short for word, short in words.items() if word in of_mkl), "any")
    return found


def find_ignored(kind: Kind, found: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The libraries on which the variables of `kind` had no effect, by the probes `found` with them
    and `here` without. MKL names its instructions on Intel's processors only."""
    silent = {"MKL"} if here["MKL"] == "any" else set()
    return [
        f"{library} uses {found[library]!r}, expected {wanted!r}"
        for library, wanted in kind.expected.items()
        if library not in silent and (wanted not in found[library] if wanted else found[library])
    ]


def settings_of(kind: Kind, here: Mapping[str, str]) -> dict[str, str]:
    """The environment of `kind`; `here` is the probe of this machine as it is."""
    environ = {"OMP_NUM_THREADS": "1", **kind.environ}
    off = [name for name in here["numpy"].split() if name.startswith(kind.without)]
    if kind.without and off:
        environ["NPY_DISABLE_CPU_FEATURES"] = " ".join(off)
    return environ


@contextmanager
def busy_cores(wanted: bool) -> Iterator[None]:
    """One busy process for each core."""
    spawn = multiprocessing.get_context("spawn")
    loops = [spawn.Process(target=_loop, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in loops if wanted else []:
        process.start()
    try:
        yield
    finally:
        for process in loops if wanted else []:
            process.kill()
            process.join()


def _loop() -> None:
    while True:
        pass


def run(kind: Kind, environ: Mapping[str, str], folder: Path, arguments: Sequence[str]) -> Outcome:
    """The marked tests and the promised results under `environ`."""
    outcome, begun_s, report = Outcome(), time.monotonic(), folder / "report.xml"
    with busy_cores(kind.busy):
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "processors", "-q", "-n", "2", "--dist",
             "loadfile", f"--junitxml={report}", *arguments],
            cwd=CHECKOUT, env={**os.environ, **environ}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        results = subprocess.run(
            [sys.executable, "-m", "tests.promised_results", str(folder / "source")],
            cwd=CHECKOUT, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True,
            check=True,
        )  # fmt: skip
    outcome.digests = json.loads(results.stdout)
    for case in ET.parse(report).iter("testcase"):
        told = {child.tag for child in case}
        if told & {"failure", "error"}:
            outcome.failures.append(f"{case.get('classname')}::{case.get('name')}")
        outcome.skipped += "skipped" in told
        outcome.passed += not told & {"failure", "error", "skipped"}
    outcome.failed = len(outcome.failures)
    if tests.returncode and not outcome.failed:
        outcome.failed, outcome.failures = 1, [f"pytest ended with {tests.returncode}"]
    if outcome.failed:
        print(tests.stdout)
    outcome.seconds = time.monotonic() - begun_s
    return outcome


def find_different(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The promised results that are not the same in all `outcomes`."""
    names = sorted({name for outcome in outcomes.values() for name in outcome.digests})
    return [
        f"{name}: " + ", ".join(f"{o.digests.get(name)} ({kind})" for kind, o in outcomes.items())
        for name in names
        if len({outcome.digests.get(name) for outcome in outcomes.values()}) > 1
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 where a test fails, a promised result differs or a variable has no effect."""
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="NAME", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="for pytest")
    options = parser.parse_args(argv)
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(KINDS)}")
    here, outcomes, ignored = probe({}), dict[str, Outcome](), list[str]()
    columns = ("kind", *LIBRARIES, "passed", "failed", "skipped", "s")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder / "source")
        for title, kind in KINDS.items():
            if options.kinds and title not in options.kinds:
                continue
            lacking = [need for need in kind.needs if need not in here["has"]]
            if lacking:
                print(f"| {title} | skipped: this machine lacks {', '.join(lacking)} |", flush=True)
                continue
            environ = settings_of(kind, here)
            found = probe(environ)
            ignored += [f"{title}: {line}" for line in find_ignored(kind, found, here)]
            outcomes[title] = got = run(kind, environ, folder, options.pytest)
            cells = [found[key] or "none" for key in LIBRARIES]
            cells += [str(n) for n in (got.passed, got.failed, got.skipped, round(got.seconds))]
            print(f"| {' | '.join([title, *cells])} |", flush=True)
    different = find_different(outcomes)
    number = max((len(outcome.digests) for outcome in outcomes.values()), default=0)
    print(f"promised results: {number - len(different)} of {number} are the same in all kinds")
    failures = [f"{kind}: {test}" for kind, o in outcomes.items() for test in o.failures]
    for line in (*ignored, *different, *failures):
        print(f"error: {line}")
    return int(bool(ignored or different or failures))


if __name__ == "__main__":
    sys.exit(main())
