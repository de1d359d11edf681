"""What keeps calls safe, in time: who works on a call where processors are few or taken, and what asking costs a call.

    python benchmarks/protection.py
    python benchmarks/protection.py --render benchmarks/results/protection.json docs/reliability.md

Each case is a process of its own. A quota needs a control group that this user may make (Linux, mostly root).
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import timeit
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "protection.json"
SHAPE = (1024, 768)
CALLS = 600
IDLE, TAKEN = "idle", "one processor taken by another process"
CASES = (IDLE, "one processor", "a quota of one processor", TAKEN, "a forked child")
# by their names, the shape, how it is viewed, and whether it is a backward with all its gradients
KINDS = {
    "(128, 768)": ((128, 768), (0, 1), False),
    "(8192, 768)": ((8192, 768), (0, 1), False),
    "(8192, 768), backward": ((8192, 768), (0, 1), True),
    "channels first, (16, 96, 56, 56)": ((16, 96, 56, 56), (0, 2, 3, 1), False),
    "channels first, backward": ((16, 96, 56, 56), (0, 2, 3, 1), True),
    "(16, 1048576)": ((16, 1 << 20), (0, 1), False),
    "(16, 1048576), backward": ((16, 1 << 20), (0, 1), True),
    "(3, 5242880)": ((3, 5 << 20), (0, 1), False),
    "(3, 5242880), backward": ((3, 5 << 20), (0, 1), True),
    "(1, 16777216)": ((1, 1 << 24), (0, 1), False),
    "(1, 16777216), backward": ((1, 1 << 24), (0, 1), True),
}
SECONDS = 5
TURNS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, put saved results into a page")
    parser.add_argument("markdown", type=Path, nargs="*", help="with --render, that page")
    parser.add_argument("--case", choices=[*CASES, "cost"], help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(of_kind(options.kind, options.case)))
        return
    if options.case:
        print(json.dumps(cost() if options.case == "cost" else measured(options.case)))
        return
    import machine
    import tables

    if options.render:
        results = json.loads(options.render.read_text(encoding="utf-8"))
        for path in options.markdown:
            tables.rewrite(path, {"protection": text(results)})
        return
    results = machine.description([]) | {
        "cases": {case: in_process(case) for case in CASES},
        "kinds": {kind: {case: in_process(case, kind) for case in (IDLE, TAKEN)} for kind in KINDS},
        "cost": in_process("cost"),
    }
    print(text(results))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def in_process(case, kind=None):
    command = [sys.executable, __file__, "--case", case, *(["--kind", kind] if kind else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{case}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def measured(case):
    """The median and the 99th percentile, in us, of each who may work, and of nbnorm's choice."""
    if case == "one processor":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with quota() if "quota" in case else busy() if "taken" in case else contextlib.nullcontext():
        if case != "a forked child":
            return times(True)
        times(True)
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            return pool.apply(times, (False,))


@contextlib.contextmanager
def quota():
    root = Path("/sys/fs/cgroup/cpu" if Path("/sys/fs/cgroup/cpu").is_dir() else "/sys/fs/cgroup")
    group = root / f"nbnorm-{os.getpid()}"
    group.mkdir()
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text("100000 100000")
    else:
        (group / "cpu.cfs_quota_us").write_text("100000")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@contextlib.contextmanager
def busy():
    """The last processor taken."""
    spin = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    time.sleep(0.5)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def times(with_numbas):
    # Numba looks at the processors when it is imported
    import nbnorm
    from nbnorm.cpu.workers import parallel

    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE, dtype=np.float32)
    weight, bias, out = np.ones(SHAPE[1], np.float32), np.ones(SHAPE[1], np.float32), np.empty_like(x)

    def call():
        nbnorm.layer_norm(x, SHAPE[1], weight, bias, out=out)

    call()
    choice = {"from_elements": parallel.from_elements, "many": parallel.many, "STALL_SECONDS": parallel.STALL_SECONDS}
    never = {"STALL_SECONDS": float("inf")}
    settings = {
        "nbnorm": choice,
        parallel.ONE: never | {"from_elements": float("inf"), "many": parallel.many},
        parallel.OURS: never | {"from_elements": 0, "many": parallel.OURS},
    }
    if with_numbas:
        settings[parallel.NUMBAS] = never | {"from_elements": 0, "many": parallel.NUMBAS}
    samples = {}
    # in long turns, since threads that wait for work take time from whoever comes next
    for _ in range(4):
        for name, values in settings.items():
            for attribute, value in values.items():
                setattr(parallel, attribute, value)
            if name != "nbnorm":
                parallel._paused_until = 0.0
            timings = []
            for _ in range(CALLS // 4 + 10):
                start = time.perf_counter()
                call()
                timings.append(time.perf_counter() - start)
            samples.setdefault(name, []).extend(timings[10:])
            if name == "nbnorm":
                choice |= {"many": parallel.many, "_paused_until": parallel._paused_until}
    return {
        name: {"median": float(np.median(values)) * 1e6, "p99": float(np.quantile(values, 0.99)) * 1e6}
        for name, values in samples.items()
    }


def of_kind(kind, case):
    """What calls of a kind take, in ms, by nbnorm's choice from its first large call on, and by one thread."""
    import nbnorm
    from nbnorm.cpu import plans
    from nbnorm.cpu.workers import parallel

    shape, axes, is_backward = KINDS[kind]
    rng = np.random.default_rng(0)
    dy, x, out = (rng.standard_normal(shape, dtype=np.float32).transpose(axes) for _ in range(3))
    cols = x.shape[-1]
    weight = np.ones(cols, np.float32)

    def call():
        start = time.perf_counter()
        if is_backward:
            nbnorm.layer_norm_backward(dy, x, cols, weight, out=(out, None, None))
        else:
            nbnorm.layer_norm(x, cols, weight, weight, out=out)
        return (time.perf_counter() - start) * 1e3

    def timings(seconds):
        end = time.perf_counter() + seconds
        values = []
        while time.perf_counter() < end or not values:
            values.append(call())
        return values

    def by_one(seconds=0):
        from_elements, parallel.from_elements = parallel.from_elements, float("inf")
        values = timings(seconds)
        parallel.from_elements = from_elements
        return values

    # both builds are compiled or loaded, and what was learnt meanwhile is forgotten
    by_one()
    call()
    for known in (plans.LAYER_NORM, plans.LAYER_NORM_BACKWARD):
        known.clear()
    parallel.watched.cache_clear()
    parallel.shortest_without.cache_clear()
    with busy() if case == TAKEN else contextlib.nullcontext():
        # who works is chosen anew, as in a process that begins now
        parallel.from_elements, parallel.many, parallel._paused_until = parallel.ELEMENTS, parallel.NUMBAS, 0.0
        parallel._is_decided = False
        samples = {"nbnorm": [], parallel.ONE: []}
        for _ in range(TURNS):
            samples["nbnorm"] += timings(SECONDS / TURNS)
            samples[parallel.ONE] += by_one(SECONDS / TURNS)
    return {
        name: {"median": float(np.median(values)), "p99": float(np.quantile(values, 0.99)), "first": values[0]}
        for name, values in samples.items()
    }


def cost():
    """What it costs a call, in us: to ask who works, and to watch Numba's threads."""
    from nbnorm.cpu.workers import parallel

    def kernel(x):
        pass

    x = np.empty(SHAPE, np.float32)
    watched = parallel.watched((kernel,), kernel)
    asking = "workers = parallel.many if size >= parallel.from_elements else ONE"
    names = {"parallel": parallel, "ONE": parallel.ONE, "size": 64, "kernel": kernel, "watched": watched, "x": x}
    best = {
        statement: min(timeit.repeat(statement, globals=names, number=100_000, repeat=20)) * 10
        for statement in (asking, "workers = size >= 32768", "kernel(x)", "watched(x)")
    }
    return {
        "asking": best[asking] - best["workers = size >= 32768"],
        "watching": best["watched(x)"] - best["kernel(x)"],
    }


def text(results):
    """The table, and the sentence about its machine."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    who = ("nbnorm", "one", "ours", "numba's")
    lines = [
        f"A float32 forward at {SHAPE[0]} x {SHAPE[1]} with `out=`, median and 99th percentile in us. Measured on "
        f"{results['date']} on {where['cpu']} ({where['logical_cores']} logical cores): {versions}.",
        "",
        "| case | nbnorm | one thread | threads of our own | Numba's threads |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, timings in results["cases"].items():
        cells = ["not measured"] * 4 if timings is None else [cell(timings.get(name)) for name in who]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Other float32 calls with `out=`, {SECONDS} seconds of each, median and 99th percentile in ms; beside a busy "
        "process also the first call.",
        "",
        "| call | idle | idle, one thread | one processor taken | the first call | one processor taken, one thread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, by_case in results["kinds"].items():
        idle, taken = by_case[IDLE], by_case[TAKEN]
        cells = [cell_ms(idle["nbnorm"]), cell_ms(idle["one"])]
        cells += [cell_ms(taken["nbnorm"]), f"{taken['nbnorm']['first']:.3g}", cell_ms(taken["one"])]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    asking, watching = results["cost"]["asking"], results["cost"]["watching"]
    lines += [
        "",
        f"To ask who works costs a call {asking:.2f} us, and to watch Numba's threads, where they work, {watching:.2f} us.",
    ]
    return "\n".join(lines)


def cell_ms(timing):
    return "not measured" if timing is None else f"{timing['median']:.3g}, {timing['p99']:.3g}"


def cell(timing):
    return "-" if timing is None else f"{timing['median']:.0f}, {timing['p99']:.0f}"


if __name__ == "__main__":
    main()
