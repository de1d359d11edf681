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
from nbnorm.cpu import sizes, staging
from nbnorm.cpu.workers import blocks, parallel, threads
from nbnorm.cpu.workers.parallel import NUMBAS, OURS

X = np.ones((16, 768), np.float32)


@pytest.fixture
def clock(monkeypatch):
    """The time that `parallel` sees, in its first entry; Numba's threads work on all calls as it begins."""
    now = [100.0]
    monkeypatch.setattr(parallel, "perf_counter", lambda: now[0])
    state = {"many": NUMBAS, "_pause": parallel.PAUSE, "_paused_until": 0.0, "_worked": 0.0, "_is_decided": True}
    for name, value in state.items():
        monkeypatch.setattr(parallel, name, value)
    monkeypatch.setattr(parallel, "from_elements", 0)
    monkeypatch.setattr(parallel, "is_crowded", lambda: False)
    return now


class Kernel:
    """One that takes as long as it is told, by Numba's threads or without them."""

    def __init__(self, clock):
        self.clock = clock
        build = (object(),)
        self.watched = parallel.watched(build, self.work)
        self.shortest_without = parallel.shortest_without(build)

    def work(self, x, seconds):
        self.clock[0] += seconds

    def by_numbas(self, x, seconds):
        parallel.end_pause()
        assert parallel.many == NUMBAS
        self.watched(x, seconds)
        return parallel.many == OURS

    def without(self, x, seconds):
        parallel.timed(self.shortest_without, self.work, x, seconds)


@pytest.fixture
def kernel(clock):
    return Kernel(clock)


def pause_of(clock):
    return parallel._paused_until - clock[0]


def end_the_pause(clock):
    clock[0] = parallel._paused_until + 1e-9


def test_a_stall_makes_numbas_threads_pause(clock, kernel):
    for seconds in (1e-5, 3e-5, 2e-5):
        assert not kernel.by_numbas(X, seconds)
    assert kernel.by_numbas(X, 1.1 * parallel.STALL_SECONDS)
    parallel.end_pause()
    assert parallel.many == OURS
    end_the_pause(clock)
    parallel.end_pause()
    assert parallel.many == NUMBAS


def test_what_is_no_stall(kernel):
    kernel.by_numbas(X, 1e-5)
    # a moment
    assert not kernel.by_numbas(X, 0.9 * parallel.STALL_SECONDS)
    # a larger call
    assert not kernel.by_numbas(np.ones((1600, 768), np.float32), 7e-4)
    # as long as its kind takes without Numba's threads
    slow = np.ones((16, 7680), np.float32)
    kernel.without(slow, 0.1)
    assert not kernel.by_numbas(slow, 0.1)


def test_a_stall_is_known_by_what_a_call_takes_without_numbas_threads(clock, kernel):
    # beside a busy process from the first call on
    x = np.broadcast_to(np.float32(1), (8, 1 << 20))
    guessed = parallel.ONE_THREAD * x.size
    assert not kernel.by_numbas(x, 1.1 * guessed)
    assert kernel.by_numbas(x, 2.5 * guessed)
    kernel.without(x, 3.0 * guessed)
    kernel.without(x, 2.0 * guessed)
    kernel.without(x, 2.2 * guessed)
    end_the_pause(clock)
    assert not kernel.by_numbas(x, 2.3 * guessed)
    assert kernel.by_numbas(x, 2.5 * guessed)
    # what is slower for another reason is measured anew
    kernel.without(x, 9.0 * guessed)
    end_the_pause(clock)
    assert not kernel.by_numbas(x, 9.0 * guessed)


def test_calls_that_are_rare_are_measured_too(clock, kernel):
    x = np.broadcast_to(np.float32(1), (8, 1 << 20))
    pauses = 0
    for _ in range(10):
        parallel.end_pause()
        if parallel.many == OURS:
            kernel.without(x, 0.01)
            break
        pauses += kernel.by_numbas(x, 0.1)
        clock[0] += 0.7
    assert pauses == 4


def test_stalls_from_the_first_call_on(kernel):
    assert kernel.by_numbas(X, 2 * parallel.STALL_SECONDS)


def test_calls_that_stall_at_once_make_one_pause(clock, kernel):
    for _ in range(8):
        kernel.watched(X, 1e-3)
    assert parallel._pause == parallel.PAUSE


def test_a_pause_costs_less_than_the_stall_that_it_makes_up_for(clock, kernel):
    x = np.broadcast_to(np.float32(1), (8, 1 << 20))
    kernel.without(x, 0.01)
    assert kernel.by_numbas(x, 0.2)
    assert pause_of(clock) == pytest.approx(parallel.PAUSE_FOR_LOSS * 0.19)
    end_the_pause(clock)
    assert kernel.by_numbas(x, 10)
    assert pause_of(clock) == pytest.approx(parallel.LONGEST_PAUSE)


# seconds between the calls, which are more than the first pauses last
@pytest.mark.parametrize("between", [0, 0.3, 1000])
def test_pauses_grow_while_stalls_go_on(clock, kernel, between):
    pauses = []
    for _ in range(10):
        assert kernel.by_numbas(X, 1e-3)
        pauses.append(pause_of(clock))
        end_the_pause(clock)
        clock[0] += between
        # now and then one does well
        kernel.by_numbas(X, 1e-5)
    assert pauses == pytest.approx([min(parallel.PAUSE * 2**n, parallel.LONGEST_PAUSE) for n in range(10)])
    # a stall that comes after they have worked long enough is a first one
    for _ in range(11_000):
        kernel.by_numbas(X, 1e-5)
    assert kernel.by_numbas(X, 1e-3)
    assert pause_of(clock) == pytest.approx(parallel.PAUSE)


def test_calls_end_the_pause(clock, monkeypatch):
    monkeypatch.setattr(parallel, "STALL_SECONDS", math.inf)
    parallel._pause_numbas(clock[0], 0.001)
    for _ in range(2):
        nbnorm.layer_norm(X, 768)
        assert parallel.many == OURS
    clock[0] += parallel.PAUSE + 1
    nbnorm.layer_norm(X, 768)
    assert parallel.many == NUMBAS


@pytest.fixture
def crowd(monkeypatch, tmp_path):
    """How many threads want to run, with the calling one, is what this is called with."""
    load = tmp_path / "loadavg"
    monkeypatch.setattr(parallel, "LOAD", load)
    monkeypatch.setattr(parallel, "our_threads", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    return lambda wanting: load.write_text(f"0.20 0.18 0.12 {wanting}/80 11206\n")


def test_a_crowd(crowd):
    for wanting, expected in ((1, False), (3, False), (4, True), (400, True), ("", False), ("x", False)):
        crowd(wanting)
        assert parallel.is_crowded() == expected
    # as where there is no such file, or it says something else
    parallel.LOAD.write_text("0.20\n")
    assert not parallel.is_crowded()
    parallel.LOAD.unlink()
    assert not parallel.is_crowded()


@pytest.mark.skipif(not parallel.LOAD.exists(), reason="the system does not say how many threads want to run")
def test_this_systems_crowd(monkeypatch):
    # as many threads as there are processors beside this one
    monkeypatch.setattr(parallel, "our_threads", lambda: os.cpu_count() + 1)
    assert parallel.is_crowded()
    monkeypatch.setattr(parallel, "our_threads", lambda: -1_000_000)
    assert not parallel.is_crowded()


def test_a_pause_goes_on_in_a_crowd(monkeypatch, clock, kernel):
    monkeypatch.setattr(parallel, "is_crowded", lambda: True)
    kernel.by_numbas(X, parallel.STALL_SECONDS / 2)
    assert parallel.many == NUMBAS, "a crowd alone ends no work that goes well"
    kernel.by_numbas(X, 1.0)
    for _ in range(3):
        end_the_pause(clock)
        parallel.end_pause()
        assert parallel.many == OURS
        assert pause_of(clock) == pytest.approx(parallel.PAUSE)
    assert parallel.may_be_numbas()
    monkeypatch.setattr(parallel, "is_crowded", lambda: False)
    end_the_pause(clock)
    parallel.end_pause()
    assert parallel.many == NUMBAS


@pytest.mark.parametrize("is_crowded", [False, True])
def test_the_first_call_in_a_crowd(monkeypatch, clock, is_crowded):
    monkeypatch.setattr(parallel, "_is_decided", False)
    monkeypatch.setattr(parallel, "_may_launch", lambda: True)
    monkeypatch.setattr(parallel, "processors", lambda thread=0: 2)
    monkeypatch.setattr("numba.core.config.NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(parallel, "is_crowded", lambda: is_crowded)
    assert parallel.workers(1 << 20) == (OURS if is_crowded else NUMBAS)
    assert parallel.may_be_numbas()
    if is_crowded:
        assert pause_of(clock) == pytest.approx(parallel.PAUSE)
    # a child of a fork never may
    monkeypatch.setattr(parallel, "many", OURS)
    monkeypatch.setattr(parallel, "_paused_until", 0.0)
    assert not parallel.may_be_numbas()


@pytest.mark.parametrize("case", ["in blocks that follow each other", "long rows"])
def test_a_stall_within_a_call_of_many_blocks_changes_who_works_on_the_rest(clock, monkeypatch, rng, case):
    monkeypatch.setattr(staging, "BUFFER_ELEMENTS", 10 * 768)
    monkeypatch.setattr(parallel, "our_threads", lambda: 2)
    if case == "long rows":
        monkeypatch.setattr(sizes, "LONG_ROW", 100)
        monkeypatch.setattr(sizes, "LONG_GROUP_ELEMENTS", 10 * 768)
        monkeypatch.setattr(blocks, "LONG_ROWS", math.inf)
    memory = rng.standard_normal((101, 768), dtype=np.float32)
    expected = nbnorm.layer_norm(memory[:-1], 768)
    worked = []
    watched, timed = parallel.watched, parallel.timed

    def stalling(build, kernel):
        call = watched(build, kernel)

        def stalls_at_the_third(*arguments):
            worked.append(NUMBAS)
            if len(worked) == 3:
                parallel._pause_numbas(clock[0], 1.0)
            call(*arguments)

        return stalls_at_the_third

    def counted(*arguments):
        worked.append(OURS)
        timed(*arguments)

    monkeypatch.setattr(parallel, "watched", stalling)
    monkeypatch.setattr(parallel, "timed", counted)
    parallel.many = NUMBAS
    out = np.empty_like(expected) if case == "long rows" else memory[1:]
    np.testing.assert_array_equal(nbnorm.layer_norm(memory[:-1], 768, out=out), expected)
    assert worked == [NUMBAS] * 3 + [OURS] * 7


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
        code = "from nbnorm.cpu.workers import parallel; print(parallel.processors())"
        join = f"import pathlib, os; pathlib.Path('{group}/cgroup.procs').write_text(str(os.getpid())); {code}"
        run = subprocess.run([sys.executable, "-c", join], env=python_environment, capture_output=True, text=True)
        assert (run.stdout, run.stderr) == ("1\n", "")
    finally:
        group.rmdir()
