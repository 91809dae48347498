"""Limits of control groups, of both versions, from inside a container or outside."""

import pytest

from accelx import fit_memory
from accelx.launch import kernel

V2 = "0::/job/7\n"
V1 = "9:name=systemd:/\n7:cpuacct,cpu:/job/7\n4:memory:/job/7\n0::/\n"


def written(root, groups, files):
    """A /proc and a /sys under `root`, in which the process is in these groups."""
    here = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": groups, **here}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def old(folder, quota):
    """The files of version 1."""
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": "2\n",
    }


QUOTAS = {
    "own": (V2, {"job/7/cpu.max": "250000 100000\n"}, 2.5),
    "around": (V2, {"job/7/cpu.max": "max 9\n", "job/cpu.max": "9 3\n"}, 3.0),
    "inside": (V2, {"cpu.max": "50000 100000\n"}, 0.5),
    "v1": (V1, old("cpu/job/7", 8), 4.0),
    "v1 inside": (V1, old("cpu", 3), 1.5),
    "v1 without a limit": (V1, old("cpu", -1), None),
    "another's": (V2, {"job/8/cpu.max": "100000 100000\n"}, None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_time_that_may_be_used_is_the_least_around(tmp_path, case):
    """In CPUs; None where there is no limit."""
    groups, files, wanted = QUOTAS[case]
    assert kernel.quota(written(tmp_path, groups, files)) == wanted


def memory(folder, most, used, stat=""):
    """The files of a group: version 2 where the folder is no controller's."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    if not folder.startswith("memory"):
        names = ("memory.max", "memory.current")
    return {
        f"{folder}/{names[0]}": f"{most}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


ROOMS = {
    "own": (V2, memory("job/7", 100, 60, "anon 50\nfile 10\n"), [50]),
    "around": (V2, memory("job/7", "max", 60) | memory("job", 90, 80), [10]),
    "inside": (V2, memory(".", 100, 60), [40]),
    "v1": (V1, memory("memory/job/7", 100, 60, "cache 9\ntotal_cache 5\n"), [45]),
    "v1 inside": (V1, memory("memory", 100, 60), [40]),
    "none": (V2, {}, []),
}


@pytest.mark.parametrize("case", ROOMS)
def test_memory_that_is_left_is_what_groups_leave(tmp_path, case):
    """In bytes, with what files hold, which is given back."""
    groups, files, wanted = ROOMS[case]
    assert fit_memory._of_group(written(tmp_path, groups, files)) == wanted
