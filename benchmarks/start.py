"""What a new process does first, beside another build of the package: CPU seconds, and their ratios.

    python benchmarks/start.py --beside ../another-checkout

Each sample is of a process of its own, one of this build and one of the other by turns; the minimum of each counts.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
# prints the CPU seconds of importing the package, after NumPy and Numba, and of a first forward and backward
FIRST = """
from time import process_time
import numpy as np
import numba
start = process_time()
import nbnorm
imported = process_time()
rows, cols = {shape}
x, weight = np.ones((rows, cols), np.float32), np.ones(cols, np.float32)
begun = process_time()
nbnorm.layer_norm(x, cols, weight, weight)
nbnorm.layer_norm_backward(x, x, cols, weight)
print(imported - start, process_time() - begun)
"""
# what Numba's own cache takes for the least that can be
ONE_LINE = """
from time import process_time
import numpy as np
from numba import njit
@njit(cache=True)
def increment(a):
    a += 1
a = np.ones(3)
begun = process_time()
increment(a)
print(process_time() - begun)
"""
# ordinary rows, short ones, long ones, and many, which several threads share
SHAPES = (4, 768), (4, 64), (2, 70_000), (1000, 768)


def seconds(code, package, cache):
    environment = os.environ | {"PYTHONPATH": str(package), "NUMBA_CACHE_DIR": cache}
    # an installed package has its bytecode
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, code], env=environment, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--beside", type=Path, required=True, help="folder of another checkout")
    arguments.add_argument("--repeats", type=int, default=3, help="processes of each kind (default: %(default)s)")
    options = arguments.parse_args()
    packages = {"here": HERE, "beside": options.beside.resolve()}
    with tempfile.TemporaryDirectory() as folder:
        builds = [
            Path(shutil.copytree(package / "nbnorm", f"{folder}/{name}/nbnorm")).parent for name, package in packages.items()
        ]
        print(f"{'CPU s':>32} {'here':>8} {'beside':>8} {'ratio':>6}")
        for shape in SHAPES:
            code = Path(folder) / "first.py"
            code.write_text(FIRST.format(shape=shape))
            cold, cached = ([[], []] for _ in range(2))
            for repeat in range(options.repeats):
                for i, build in enumerate(builds):
                    cold[i].append(seconds(code, build, f"{folder}/{shape}-{i}-{repeat}")[-1])
            for _ in range(3 * options.repeats):
                for i, build in enumerate(builds):
                    cached[i].append(seconds(code, build, f"{folder}/{shape}-{i}-0"))
            row(f"{shape} compiled", *map(min, cold))
            row(f"{shape} from the cache", *(min(sample[1] for sample in samples) for samples in cached))
        row("import", *(min(sample[0] for sample in samples) for samples in cached))
        code = Path(folder) / "one_line.py"
        code.write_text(ONE_LINE)
        print(f"{'one line, from Numbas cache':>32} {min(seconds(code, HERE, folder)[0] for _ in range(6)):8.3f}")


def row(name, here, beside):
    print(f"{name:>32} {here:8.3f} {beside:8.3f} {here / beside:6.2f}")


if __name__ == "__main__":
    main()
