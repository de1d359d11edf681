"""The time of calls here beside those of another build of the package, in one process, and of what moves their bytes.

    python benchmarks/builds.py --beside ../another-checkout
    python benchmarks/builds.py --beside ../another-checkout --threads 1 --calls forward:bfloat16:256x47

Of one thread the CPU's time counts, which other jobs disturb less.
"""

import argparse
import importlib
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import limits
import numba
import numpy as np
from timing import measure

import nbnorm

OTHER = "nbnorm_beside"
CALLS = (
    *(f"backward:float32:{shape}" for shape in ("32x768", "128x768", "512x768", "256x256", "64x4096")),
    *(f"backward:float32:{shape}" for shape in ("8192x768", "4096x4096", "65536x256", "524288x32")),
    *(f"{kind}:float32:{shape}" for shape in ("1x16777216", "3x5000000") for kind in ("forward", "backward")),
    *(f"forward:{dtype}:{shape}" for dtype in ("bfloat16", "float16") for shape in ("16384x768", "8192x4096", "131072x256")),
    *(
        f"{kind}:{dtype}:{shape}"
        for dtype in ("bfloat16", "float16")
        for shape in ("256x767", "256x768", "512x271", "512x272", "2048x47", "2048x48")
        for kind in ("forward", "backward")
    ),
)


def other_build(checkout, folder):
    """The package of another checkout, under another name, by which it imports itself too."""
    copy = shutil.copytree(checkout / "nbnorm", Path(folder) / OTHER)
    for file in copy.rglob("*.py"):
        file.write_text(re.sub(r"\bnbnorm\b", OTHER, file.read_text(encoding="utf-8")), encoding="utf-8")
    sys.path.append(folder)
    return importlib.import_module(OTHER)


def contestants(kind, dtype, shape, other):
    """The call by both builds, and the loop that moves its bytes, all into arrays that are there."""
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  teaches NumPy the name
    cols = shape[1]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
    weight, bias = rng.standard_normal((2, cols), np.float32).astype(dtype)
    result = np.zeros_like(x)
    # 16 bits are moved as they are
    moved = [array.view(np.uint16) if array.itemsize == 2 else array for array in (dy, x, result)]
    moved = [array.reshape(-1) for array in moved]
    if kind == "forward":
        of_build = [lambda build=build: build.layer_norm(x, cols, weight, bias, out=result) for build in (nbnorm, other)]
        limit = lambda: limits.copy(*moved[1:])  # noqa: E731
    else:
        out = result, np.zeros_like(weight), np.zeros_like(bias)
        of_build = [lambda build=build: build.layer_norm_backward(dy, x, cols, weight, out=out) for build in (nbnorm, other)]
        limit = lambda: limits.add(*moved)  # noqa: E731
    return {"here": of_build[0], "beside": of_build[1], "limit": limit}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--beside", type=Path, required=True, help="folder of another checkout")
    arguments.add_argument(
        "--calls", default=",".join(CALLS), help="such as forward:bfloat16:256x47,backward:float32:32x768"
    )
    arguments.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    arguments.add_argument("--seconds", type=float, default=1.0, help="for each call (default: %(default)s)")
    options = arguments.parse_args()
    numba.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        other = other_build(options.beside.resolve(), folder)
        print("| call | ns for 16 elements | of the other build's speed | of the loop's that moves its bytes |")
        print("| --- | --- | --- | --- |")
        for call in options.calls.split(","):
            kind, dtype, shape = call.split(":")
            rows, cols = map(int, shape.split("x"))
            times = measure(contestants(kind, dtype, (rows, cols), other), options.seconds, clock)
            here, beside, limit = (times[name]["median"] for name in ("here", "beside", "limit"))
            ratios = f"{here * 16e9 / (rows * cols):.1f} | {beside / here:.2f} | {limit / here:.2f}"
            print(f"| {kind}, {dtype}, ({rows}, {cols}) | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
