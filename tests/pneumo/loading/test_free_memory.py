"""Free memory: the machine's, or what a control group leaves of it."""

from pathlib import Path

import psutil
import pytest

from pneumo.loading.free_memory import cgroup_free_bytes, free_bytes


def write_v2(group: Path, limit: str, used: int, cached: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def write_v1(group: Path, limit: int, used: int, cached: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"cache 5\ntotal_inactive_file {cached}\n")


def test_the_machine_has_some_free() -> None:
    assert 0 < free_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("limit", "expected"), [("1000", [500]), ("max", [])])
def test_a_containers_limit_counts_without_its_cached_files(
    tmp_path: Path, limit: str, expected: list[int]
) -> None:
    write_v2(tmp_path, limit, used=700, cached=200)
    assert cgroup_free_bytes(tmp_path, "0::/\n") == expected


def test_every_group_on_the_way_up_limits(tmp_path: Path) -> None:
    write_v2(tmp_path / "pod" / "container", "1000", used=100, cached=0)
    write_v2(tmp_path / "pod", "1200", used=1100, cached=0)
    assert cgroup_free_bytes(tmp_path, "0::/pod/container\n") == [900, 100]


def test_version_1_is_known(tmp_path: Path) -> None:
    membership = "5:cpu,cpuacct:/a\n4:memory:/pod\n0::/\n"
    write_v1(tmp_path / "memory" / "pod", 1000, used=600, cached=100)
    assert cgroup_free_bytes(tmp_path, membership) == [500]


def test_in_a_container_that_shows_the_hosts_names_its_own_group_is_the_top(
    tmp_path: Path,
) -> None:
    write_v1(tmp_path / "memory", 1000, used=600, cached=100)
    assert cgroup_free_bytes(tmp_path, "4:memory:/kubepods/pod17/abc\n") == [500]


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path, "1:name=systemd:/\n0::/\n") == []
