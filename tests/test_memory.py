"""Memory that can still be had: the machine's, or less within the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from hespotex._memory import available_bytes

GB = 10**9


def tree(root: Path, **files: str) -> Path:
    """Write files named by their path with ``__`` for ``/``; the machine has 64 GB free."""
    meminfo = f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {64 * GB // 1024} kB\n"
    for name, text in {"proc__meminfo": meminfo, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: str | int, used: int, cached: int = 0, *, version: int = 2) -> dict[str, str]:
    """The files of a control group."""
    if version == 2:
        names = ("memory.max", "memory.current", "memory.stat")
        stat = f"anon 5\ninactive_file {cached}\nactive_file 7\n"
    else:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        stat = f"inactive_file 3\ntotal_inactive_file {cached}\n"
    texts = (f"{limit}\n", f"{used}\n", stat)
    return {f"{folder}__{name}": text for name, text in zip(names, texts, strict=True)}


V2, V1 = "sys__fs__cgroup", "sys__fs__cgroup__memory"


def test_without_groups_it_is_what_the_machine_has(tmp_path):
    assert available_bytes(tree(tmp_path)) == pytest.approx(64 * GB, abs=1024)


def test_a_system_that_does_not_say(tmp_path):
    assert available_bytes(tmp_path) is None


def test_the_limit_of_a_job_counts_and_unused_pages_of_files_are_free(tmp_path):
    tree(
        tmp_path,
        proc__self__cgroup="0::/slurm/job_7/step_0\n",
        **group(f"{V2}__slurm__job_7__step_0", 8 * GB, 5 * GB, GB),
    )
    assert available_bytes(tmp_path) == 4 * GB


def test_the_nearest_limit_of_all_groups_above_counts(tmp_path):
    groups = group(f"{V2}__a__b__c", 9 * GB, 0) | group(f"{V2}__a__b", "max", 0) | group(f"{V2}__a", 6 * GB, 4 * GB)
    assert available_bytes(tree(tmp_path, proc__self__cgroup="0::/a/b/c\n", **groups)) == 2 * GB


@pytest.mark.parametrize("path", ["/kubepods/pod1/container2", "/", "/../../other"])
def test_in_a_container_the_limit_lies_at_the_base(tmp_path, path):
    assert available_bytes(tree(tmp_path, proc__self__cgroup=f"0::{path}\n", **group(V2, 3 * GB, GB))) == 2 * GB


def test_groups_of_others_do_not_count(tmp_path):
    groups = group(f"{V2}__mine", 5 * GB, GB) | group(f"{V2}__other", GB, 0)
    assert available_bytes(tree(tmp_path, proc__self__cgroup="0::/mine\n", **groups)) == 4 * GB


def test_version_1(tmp_path):
    lines = "11:cpu,cpuacct:/cpu\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc\n"
    groups = group(f"{V1}__docker__abc", 7 * GB, 4 * GB, GB, version=1) | group(V1, 2**63 - 4096, 9 * GB, version=1)
    assert available_bytes(tree(tmp_path, proc__self__cgroup=lines, **groups)) == 4 * GB


def test_no_limit_and_a_limit_beyond_the_machine_change_nothing(tmp_path):
    groups = group(f"{V2}__a", "max", GB) | group(V2, 900 * GB, 5 * GB)
    root = tree(tmp_path, proc__self__cgroup="0::/a\n", **groups)
    assert available_bytes(root) == pytest.approx(64 * GB, abs=1024)


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    assert available_bytes(tree(tmp_path, proc__self__cgroup="0::/a\n", **group(f"{V2}__a", GB, 2 * GB))) == 0


def test_a_group_whose_cache_is_not_told(tmp_path):
    root = tree(tmp_path, proc__self__cgroup="0::/a\n", **group(f"{V2}__a", 3 * GB, GB))
    (root / "sys/fs/cgroup/a/memory.stat").unlink()
    assert available_bytes(root) == 2 * GB


def test_here_something_sensible_comes_out():
    free = available_bytes()
    assert free is None or 0 < free < 2**50
