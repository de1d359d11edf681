"""The time of the norms here, in other libraries, and of the memory traffic that they cannot do without.

Prints Markdown tables, and saves STEM.json with every number and STEM.png. Libraries that are not installed are left out.
Nothing else should run meanwhile: with one of two cores taken, OpenMP's threads wait for each other for a time slice of the
system's, 8 ms, in every call.

    python benchmarks/compare.py
    python benchmarks/compare.py --shapes 8192x768,1x64 --dtypes float32,bfloat16 --passes forward
    python benchmarks/compare.py --norms rms,add-layer
    python benchmarks/compare.py --avx2 --output benchmarks/results/compare-cpu-avx2
    python benchmarks/compare.py --device cuda
    python benchmarks/compare.py --render benchmarks/results/compare-cpu.json README.md docs/index.md docs/performance.md
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import contestants
import machine
import numba
import numpy as np
import residual_contestants
import rms_contestants
import tables
from timing import measure
from tqdm import tqdm

PASSES = ["forward", "backward"]
# what the names of a norm's passes begin with; "add" is that of x + residual
NORMS = {"layer": "", "rms": "RMS ", "add-layer": "residual ", "add-rms": "residual RMS "}
RESULTS = Path(__file__).parent / "results"
LARGE = (
    (8192, 768),
    (4096, 4096),
    (65536, 256),
    (10000, 1000),
    (524288, 32),
    (16, 1 << 20),
    (3, 5_000_000),
    (1, 1 << 24),
)
LARGE_BACKWARD = ((1 << 20, 16), (4, 1 << 20))
# of the other norms, which have the same kernels: as much as decides whether these serve them
OTHER_NORMS = ((8192, 768), (65536, 256))
OTHER_NORMS_SMALL = ((1, 64), (32, 768))
SMALL = ((1, 64), (8, 64), (1, 768), (8, 768), (32, 768), (128, 768))
# the first of them, for what is not float32
COMMON = 5
QUICK = ((8, 64), (512, 320))
QUICK_SECONDS = 0.02
# how far y or dx may be from nbnorm's, of its largest element: enough to tell that a contestant computes the same thing
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
# and sums over rows: torch's of bfloat16 over 524,288 rows are 0.52 away, its float32 ones agree
SUM_TOLERANCE = TOLERANCE | {"float16": 1.0, "bfloat16": 1.0}


def main():
    options = parse()
    if options.render:
        results = json.loads(options.render.read_text(encoding="utf-8"))
        texts = tables.tables(results)
        for path in options.markdown:
            tables.rewrite(path, texts)
        if not options.markdown:
            print(tables.everything(texts))
        plot(results, options.render.with_suffix(".png"))
        return
    if options.avx2 and machine.instructions() not in ("AVX-512", "AVX2"):
        raise SystemExit(f"--avx2 needs a processor with AVX2; this one has {machine.instructions()}")
    if options.avx2 and machine.instructions() != "AVX2":
        # what Numba and the others compile for is settled as they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], machine.avx2_alone())
    results = run_on_cuda(options) if options.device == "cuda" else run(options)
    print(tables.everything(tables.tables(results)))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1)
        options.output.with_name(f"{options.output.name}.json").write_text(text + "\n", encoding="utf-8")
        plot(results, options.output.with_name(f"{options.output.name}.png"))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, help="ROWSxCOLS,... for every dtype and pass")
    parser.add_argument("--dtypes", type=one_of(*TOLERANCE), default=["float32", "float16", "bfloat16"])
    parser.add_argument("--passes", type=one_of(*PASSES), default=PASSES, help="default: both")
    parser.add_argument(
        "--norms", type=one_of(*NORMS), default=list(NORMS), help="on the CPU, some of layer,rms,add-layer,add-rms"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="for each problem, about (default: 1.5)")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="for everybody (default: %(default)s)")
    parser.add_argument("--keep-memory", action="store_true", help="allocations reuse what was freed (glibc): kernels alone")
    parser.add_argument("--avx2", action="store_true", help="as on a processor without AVX-512, for all but ONNX Runtime")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="STEM", help="default: compare-cpu in results/ beside this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs; saved only with --output")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, render saved results")
    parser.add_argument("markdown", type=Path, nargs="*", help="with --render, files to put the tables into")
    options = parser.parse_args()
    if options.markdown and not options.render:
        parser.error("Markdown files are for --render")
    if options.quick and options.device == "cuda":
        options.seconds = QUICK_SECONDS
    elif options.quick:
        options.shapes, options.seconds = options.shapes or QUICK, QUICK_SECONDS
    elif not options.output:
        options.output = RESULTS / f"compare-{options.device}"
    return options


def shapes(text):
    pairs = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text}; expected ROWSxCOLS,...")
    return pairs


def one_of(*names):
    """A parser of comma-separated names."""

    def parse_names(text):
        chosen = text.split(",")
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"{text}; expected some of {', '.join(names)}")
        return chosen

    return parse_names


def run_on_cuda(options):
    # imported here, since it needs numba.cuda
    import cuda_compare

    return cuda_compare.run(options)


def run(options):
    peers = contestants.installed()
    left_out = [name for name in contestants.MODULES if name not in peers]
    contestants.prepare(peers, options.threads)
    if options.keep_memory:
        machine.keep_memory()
    problems = [
        (norm, pass_, dtype, shape)
        for norm in options.norms
        for pass_ in options.passes
        for dtype in options.dtypes
        for shape in options.shapes or default_shapes(norm, pass_, dtype)
    ]
    timed = []
    with tqdm(problems, file=sys.stderr, unit=" problems", leave=False, disable=None) as bar:
        for norm, pass_, dtype, shape in bar:
            bar.set_description(f"{NORMS[norm]}{pass_} {dtype} {shape[0]}x{shape[1]}")
            timed.append(run_problem(norm, pass_, dtype, shape, peers, options))
    settings = {"threads": options.threads, "keep_memory": options.keep_memory}
    return {**machine.description(peers), **settings, "left_out": left_out, "problems": timed}


def default_shapes(norm, pass_, dtype):
    if norm != "layer":
        return OTHER_NORMS + (OTHER_NORMS_SMALL if dtype == "float32" else ())
    if dtype != "float32":
        return LARGE[:COMMON]
    return LARGE + (LARGE_BACKWARD if pass_ == "backward" else ()) + SMALL


def run_problem(norm, pass_, dtype, shape, peers, options):
    asked, choices = {
        "layer": (contestants, {}),
        "rms": (rms_contestants, {}),
        "add-layer": (residual_contestants, {"is_rms": False}),
        "add-rms": (residual_contestants, {"is_rms": True}),
    }[norm]
    arrays = asked.make_arrays(dtype, *shape)
    calls = getattr(asked, pass_)(arrays, peers, options.threads, **choices)
    check_that_they_agree(calls, dtype)
    return {
        "pass": NORMS[norm] + pass_,
        "dtype": dtype,
        "rows": shape[0],
        "cols": shape[1],
        "bytes": asked.bytes_moved(pass_, arrays),
        "contestants": measure(calls, options.seconds),
    }


def check_that_they_agree(calls, dtype):
    """So that nobody is timed doing something else. It is the call that compiles, too."""
    ours = as_float32(calls["nbnorm"]())
    for name, call in calls.items():
        theirs = call()
        if theirs is None:
            continue
        for mine, other in zip(ours, as_float32(theirs), strict=True):
            error = np.abs(other - mine).max() / np.abs(mine).max()
            allowed = SUM_TOLERANCE if mine.ndim == 1 else TOLERANCE
            # NaN too
            if not error <= allowed[dtype]:
                raise SystemExit(f"{name}: {dtype} {mine.shape} is {error:.2g} of its largest element away from nbnorm's")


def as_float32(result):
    """The arrays of a result, copied: a contestant's `out` is written again."""
    arrays = result if isinstance(result, tuple) else (result,)
    # a torch tensor of bfloat16 has no NumPy array
    return [np.array(array.float().numpy() if hasattr(array, "float") else array, np.float32) for array in arrays]


def plot(results, path):
    """The bandwidths of layer norm: of the first dtype's large problems, or on a CUDA device of every dtype's."""
    large = [problem for problem in results["problems"] if problem["pass"] in PASSES and not tables.is_small(problem)]
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path.name} without matplotlib: pip install matplotlib", file=sys.stderr)
    elif large:
        import plots

        if results.get("device") == "cuda":
            plots.bandwidth_by_dtype(large, path)
            return
        dtype = large[0]["dtype"]
        plots.bandwidth([problem for problem in large if problem["dtype"] == dtype], dtype, path)


if __name__ == "__main__":
    main()
