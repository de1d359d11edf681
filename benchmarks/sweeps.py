"""Bandwidth by row length, and time by number of rows, here and elsewhere, forward and backward, float32.

Saves row-length-cpu.json and rows-cpu.json with every number, and a picture of each, in results/ beside this file; with
--keep-memory row-length-cpu-kept and rows-cpu-kept. Nothing else should run meanwhile; it takes about four minutes.

    python benchmarks/sweeps.py
    python benchmarks/sweeps.py --keep-memory --sweeps row-length
    python benchmarks/sweeps.py --render
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import compare
import numba

# of each array: 64 MiB, beyond the caches
ELEMENTS = 1 << 24
SHAPES = {
    "row-length": [(ELEMENTS // cols, cols) for cols in (1 << n for n in (*range(4, 15), 16, 18, 20, 22, 24))],
    "rows": [(1 << n, 768) for n in range(15)],
}
QUICK = {"row-length": [(1 << 12, 64), (1 << 8, 1024)], "rows": [(1, 64), (8, 64)]}


def main():
    options = parse()
    for name in options.sweeps:
        stem = options.output / f"{name}-cpu{'-kept' if options.keep_memory else ''}"
        if not options.render:
            options.shapes = (QUICK if options.quick else SHAPES)[name]
            options.output.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".json").write_text(json.dumps(compare.run(options), indent=1) + "\n", encoding="utf-8")
        plot(name, stem)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=compare.one_of(*SHAPES), default=list(SHAPES), help="default: both")
    parser.add_argument("--passes", type=compare.one_of(*compare.PASSES), default=compare.PASSES, help="default: both")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each problem, about (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="for everybody (default: %(default)s)")
    parser.add_argument("--keep-memory", action="store_true", help="allocations reuse what was freed (glibc): kernels alone")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=compare.RESULTS, help="default: results/")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--render", action="store_true", help="measure nothing, draw what the JSON files have")
    options = parser.parse_args()
    options.norms, options.dtypes = ["layer"], ["float32"]
    if options.quick:
        options.seconds = compare.QUICK_SECONDS
    return options


def plot(name, stem):
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {stem.name}.png without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    import plots

    draw = {"row-length": plots.bandwidth_by_row_length, "rows": plots.time_by_rows}[name]
    draw(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
