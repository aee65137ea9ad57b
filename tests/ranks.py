"""Ranks of a distributed training as processes of this machine, all running one script."""

import os
import subprocess
import sys
from pathlib import Path

_BEGIN = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from pneumo.loading.sample_order import World

folder, rank, size, arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
world = World(rank, size)
torch.set_num_threads(1)
if size > 1:
    meeting = f"file://{folder}/meeting-of-{size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
"""
# Without the interpreter's end: there C++ objects go while a thread of gloo's may still run, which
# once in some hundred times ends the process by SIGABRT, after all that is tested here.
_END = """
if size > 1:
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def run_ranks(
    script: str, folder: Path, size: int, *arguments: str, timeout_s: float = 500
) -> None:
    """Run `script` in so many processes, each with its `folder`, `rank`, `size`, `world` and
    `arguments`; they form a gloo group where there are several. Fails when one of them does."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", _BEGIN + script + _END, str(folder)]
    (folder / f"meeting-of-{size}").unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for rank, process in enumerate(ranks):
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as late:
                said = (late.stdout or b"").decode(errors="replace")
                raise AssertionError(
                    f"waited {timeout_s:g} s for rank {rank} of {size} to end; it said {said!r}"
                ) from None
            assert process.returncode == 0, output
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
