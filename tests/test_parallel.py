"""Who works on a call: Numba's threads, ours while those stall, and no more than there are processors for."""

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import nbnorm
from nbnorm.cpu import parallel, threads
from nbnorm.cpu.parallel import NUMBAS, OURS

X = np.ones((16, 768), np.float32)


@pytest.fixture
def clock(monkeypatch):
    """The time that `parallel` sees, in its first entry; Numba's threads work on all calls as it begins."""
    now = [100.0]
    monkeypatch.setattr(parallel, "perf_counter", lambda: now[0])
    for name, value in {"many": NUMBAS, "_pause": parallel.PAUSE, "_paused_until": 0.0, "_is_decided": True}.items():
        monkeypatch.setattr(parallel, name, value)
    monkeypatch.setattr(parallel, "from_elements", 0)
    return now


def watched(clock):
    """A kernel of Numba's threads that takes as long as it is told."""

    def kernel(x, seconds):
        clock[0] += seconds

    return parallel.watched(kernel)


def test_a_stall_makes_numbas_threads_pause(clock):
    call = watched(clock)
    for seconds in (1e-5, 3e-5, 2e-5):
        call(X, seconds)
        assert parallel.many == NUMBAS
    call(X, 1.1 * parallel.STALL_SECONDS)
    assert parallel.many == OURS
    parallel.end_pause()
    assert parallel.many == OURS
    clock[0] += 1.01 * parallel.PAUSE
    parallel.end_pause()
    assert parallel.many == NUMBAS


def test_what_is_no_stall(clock):
    call = watched(clock)
    call(X, 1e-5)
    # a moment
    call(X, 0.9 * parallel.STALL_SECONDS)
    # a larger call, and one of a kind that takes longer
    call(np.ones((1600, 768), np.float32), 1e-3)
    call(np.ones((16_000, 16), np.float32), 1e-3)
    assert parallel.many == NUMBAS


def test_stalls_from_the_first_call_on(clock):
    call = watched(clock)
    call(X, 2 * parallel.STALL_SECONDS)
    assert parallel.many == OURS


def test_calls_that_stall_at_once_make_one_pause(clock):
    call = watched(clock)
    for _ in range(8):
        call(X, 0.01)
    assert parallel._pause == parallel.PAUSE


def test_pauses_grow_while_stalls_go_on(clock):
    call = watched(clock)
    pauses = []
    for _ in range(10):
        call(X, 0.01)
        pauses.append(parallel._paused_until - clock[0])
        clock[0] = parallel._paused_until + 1e-9
        parallel.end_pause()
    assert pauses == pytest.approx([min(parallel.PAUSE * 2**n, parallel.LONGEST_PAUSE) for n in range(10)])
    # a stall that comes much later is a first one
    clock[0] += 1000
    call(X, 0.01)
    assert parallel._paused_until - clock[0] == pytest.approx(parallel.PAUSE)


def test_calls_end_the_pause(clock, monkeypatch):
    monkeypatch.setattr(parallel, "STALL_SECONDS", math.inf)
    parallel._pause_numbas(clock[0])
    for _ in range(2):
        nbnorm.layer_norm(X, 768)
        assert parallel.many == OURS
    clock[0] += parallel.PAUSE + 1
    nbnorm.layer_norm(X, 768)
    assert parallel.many == NUMBAS


def test_an_error_in_another_thread_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(parallel, "our_threads", lambda: 3)
    calls = []

    def kernel(piece):
        calls.append(piece)
        time.sleep(0.001)
        if threading.current_thread().name == "nbnorm":
            raise MemoryError("no memory")

    with pytest.raises(MemoryError, match="no memory"):
        threads.share(kernel, [(n,) for n in range(1000)], 3)
    assert len(calls) < 1000


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (["max 100000\n"], math.inf),
        (["200000 100000\n"], 2),
        (["150000 100000\n"], 2),
        (["50000 100000\n"], 1),
        (["-1\n", "100000\n"], math.inf),
        (["100000\n", "100000\n"], 1),
        (["no number\n"], math.inf),
        ([], math.inf),
    ],
)
def test_quotas_as_control_groups_say_them(tmp_path, contents, expected):
    files = [tmp_path / str(n) for n in range(len(contents) or 1)]
    for file, content in zip(files, contents, strict=False):
        file.write_text(content)
    assert parallel._quota_of(*files) == expected


def test_a_group_and_those_that_it_is_part_of():
    assert parallel._groups("/sys/fs/cgroup", "/a/b") == [
        Path("/sys/fs/cgroup/a/b"),
        Path("/sys/fs/cgroup/a"),
        Path("/sys/fs/cgroup"),
    ]
    assert parallel._groups("/sys/fs/cgroup", "/") == [Path("/sys/fs/cgroup")]


def test_the_quota_of_a_process(python_environment):
    """A control group of its own, where this system lets us make one."""
    group = Path("/sys/fs/cgroup/cpu" if Path("/sys/fs/cgroup/cpu").is_dir() else "/sys/fs/cgroup") / f"nbnorm-{os.getpid()}"
    try:
        group.mkdir()
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("100000 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"LEFT OUT: no control group can be made here: {error}")
    try:
        code = "from nbnorm.cpu import parallel; print(parallel.processors())"
        join = f"import pathlib, os; pathlib.Path('{group}/cgroup.procs').write_text(str(os.getpid())); {code}"
        run = subprocess.run([sys.executable, "-c", join], env=python_environment, capture_output=True, text=True)
        assert (run.stdout, run.stderr) == ("1\n", "")
    finally:
        group.rmdir()
