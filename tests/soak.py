"""Calls of mixed kinds from many threads, every result compared, memory watched: `python tests/soak.py --seconds 300`.

Each result must have the bits of the first of its kind, which is compared with the oracle before the threads start.
"""

import argparse
import random
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

import nbnorm
from tolerances import assert_grads, assert_y

SHAPES = [(1, 64), (7, 33), (32, 768), (200, 768), (2000, 100), (5000, 16), (3, 70_000), (1, 200_000), (64, 4096)]
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
# a result that is large enough to be kept for the next one, and written past the caches
LARGE = (6000, 768)


class Case:
    """A kind of call, and what it returns."""

    def __init__(self, shape, dtype, use_diff_of_squares, rng):
        cols = shape[-1]
        self.shape = shape
        self.use_diff_of_squares = use_diff_of_squares
        self.dy, self.x = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
        self.weight, self.bias = (rng.standard_normal(cols, dtype=np.float32).astype(dtype) for _ in range(2))
        self.expected = self.results()
        assert_y(self.expected[0], self.x, 1, self.weight, self.bias, use_diff_of_squares=use_diff_of_squares)
        assert_grads(
            nbnorm.functional.LayerNormGrads(*self.expected[1:]),
            self.dy,
            self.x,
            1,
            self.weight,
            use_diff_of_squares=use_diff_of_squares,
        )

    def results(self, out=None):
        cols = self.shape[-1]
        modes = {"use_diff_of_squares": self.use_diff_of_squares}
        y = nbnorm.layer_norm(self.x, cols, self.weight, self.bias, out=out, **modes)
        return y, *nbnorm.layer_norm_backward(self.dy, self.x, cols, self.weight, **modes)

    def are_right(self, results):
        # as bytes: NaN is itself
        return all(a.tobytes() == b.tobytes() for a, b in zip(results, self.expected, strict=True))


def cases(seed):
    rng = np.random.default_rng(seed)
    made = [Case(shape, dtype, mode, rng) for shape in SHAPES for dtype in DTYPES for mode in (False, True)]
    return [*made, Case(LARGE, np.dtype(np.float32), False, rng)]


def soak(seconds, threads, seed=0):
    """Return the calls of each thread, the wrong results, and the resident memory in MiB, early and at the end."""
    kinds = cases(seed)
    stop = time.monotonic() + seconds
    calls = [0] * threads
    wrong = []

    def work(number):
        choose = random.Random(seed + number)
        outs: dict = {}
        while time.monotonic() < stop:
            kind = choose.choice(kinds)
            out = outs.setdefault(id(kind), np.empty_like(kind.x)) if choose.random() < 0.5 else None
            if not kind.are_right(kind.results(out)):
                wrong.append((kind.shape, kind.x.dtype.name, kind.use_diff_of_squares))
            calls[number] += 2

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    # by then every thread has its buffers
    time.sleep(seconds / 4)
    early = resident()
    for worker in workers:
        worker.join()
    return calls, wrong, early, resident()


def resident():
    """The MiB of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    calls, wrong, early, late = soak(arguments.seconds, arguments.threads)
    print(f"{sum(calls)} calls from {len(calls)} threads, at least {min(calls)} each; {len(wrong)} wrong: {wrong[:5]}")
    print(f"resident memory: {early:.0f} MiB after a quarter of the time, {late:.0f} at the end")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
