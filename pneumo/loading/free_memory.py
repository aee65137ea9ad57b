"""How much memory this process may still use: the machine's, or what its control groups leave."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def free_bytes() -> int:
    """Available bytes of the machine, or of the process's control group where they are fewer."""
    left = [int(psutil.virtual_memory().available)]
    if MEMBERSHIP.exists():
        left += cgroup_free_bytes(CGROUPS, MEMBERSHIP.read_text())
    return max(min(left), 0)


def cgroup_free_bytes(root: Path, membership: str) -> list[int]:
    """Bytes left under the limit of each control group from the process's one up to `root`.

    `membership` is the content of /proc/self/cgroup (cgroups(7)); versions 1 and 2 are supported.
    """
    found = []
    for folder, (limit, usage, cached) in _list_groups(root, membership):
        if not (folder / limit).exists():
            continue
        allowed = (folder / limit).read_text().strip()
        if allowed != "max":
            # Cached files count as usage, though the kernel frees them under pressure.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage).read_text()) - int(stat.get(cached, 0))
            found.append(int(allowed) - used)
    return found


def _list_groups(root: Path, membership: str) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    for line in membership.splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in {"", "memory"} and "memory" not in controllers.split(","):
            continue
        top, files = (root, _V2) if not controllers else (root / "memory", _V1)
        # In a container the name may be that of the host; the container's group is then `top`.
        group = top / name.strip("/")
        while group != top and top in group.parents:
            yield group, files
            group = group.parent
        yield top, files
