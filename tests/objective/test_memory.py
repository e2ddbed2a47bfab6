"""How much memory is free: the machine's, and what control groups of either version leave, however deep."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import sharpkit as sk
from sharpkit.objective import memory

CPU = torch.device("cpu")
GIB = 2.0**30
MEMINFO = {"/proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"}  # 8 GiB


def v2(folder: str, limit: str, used: float, cache: float = 0) -> dict[str, str]:
    root = f"/sys/fs/cgroup{folder}"
    return {
        f"{root}/memory.max": f"{limit}\n",
        f"{root}/memory.current": f"{used:.0f}\n",
        f"{root}/memory.stat": f"anon 5\ninactive_file {cache:.0f}\n",
    }


def v1(folder: str, limit: float, used: float, cache: float = 0) -> dict[str, str]:
    root = f"/sys/fs/cgroup/memory{folder}"
    return {
        f"{root}/memory.limit_in_bytes": f"{limit:.0f}\n",
        f"{root}/memory.usage_in_bytes": f"{used:.0f}\n",
        f"{root}/memory.stat": f"cache 9\ntotal_inactive_file {cache:.0f}\n",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        (MEMINFO, 8 * GIB),
        (MEMINFO | {"/proc/self/cgroup": "0::/\n"} | v2("", "max", GIB), 8 * GIB),
        (MEMINFO | {"/proc/self/cgroup": "0::/\n"} | v2("", str(4 * 2**30), GIB), 3 * GIB),
        (MEMINFO | {"/proc/self/cgroup": "0::/job/step\n"} | v2("/job/step", "max", GIB) | v2("/job", str(5 * 2**30), 3 * GIB), 2 * GIB),
        (MEMINFO | {"/proc/self/cgroup": "0::/job\n"} | v2("/job", str(4 * 2**30), 4 * GIB, cache=GIB), GIB),
        (MEMINFO | {"/proc/self/cgroup": "0::/not/mounted\n"} | v2("", str(4 * 2**30), 3.5 * GIB), GIB / 2),
        (
            MEMINFO | {"/proc/self/cgroup": "4:memory:/a/b\n0::/\n"} | v1("/a/b", 2**63, GIB) | v1("/a", 2 * GIB, GIB, cache=GIB / 4),
            1.25 * GIB,
        ),
        (MEMINFO | {"/proc/self/cgroup": "5:cpu,memory:/a\n"} | v1("", 3 * GIB, GIB), 2 * GIB),
        (MEMINFO | {"/proc/self/cgroup": "0::/\n"} | v2("", str(2**30), 2 * GIB), 0.0),
        ({"/proc/self/cgroup": "0::/\n"} | v2("", str(2**31), GIB), GIB),
    ],
    ids=[
        "unknown",
        "machine",
        "no limit",
        "limit",
        "around",
        "file pages",
        "elsewhere",
        "version 1",
        "version 1 root",
        "overdrawn",
        "group",
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_all_control_groups(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: float
) -> None:
    monkeypatch.setattr(memory, "_text", lambda file: files.get(str(Path(file)), ""))
    assert memory.available_memory(CPU) == pytest.approx(expected)


def test_a_basis_and_retained_graphs_keep_to_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharpkit.linalg.krylov import affordable_rows

    operator = sk.as_operator(torch.eye(10, dtype=torch.float64))
    monkeypatch.setattr("sharpkit.operators.base.available_memory", lambda device: 1600.0)
    assert operator.free_memory() == operator.free_memory(host=True) == 1600
    assert affordable_rows(operator) == 10, "half of 1600 bytes, 80 a row"
    monkeypatch.setattr("sharpkit.operators.base.available_memory", lambda device: math.inf)
    assert affordable_rows(operator) > 1000, "where the system does not tell, a usual machine's memory is assumed"
