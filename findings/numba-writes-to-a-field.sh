#!/usr/bin/env bash
# Numba 0.68.1, NumPy 2.4.6: what a prange loop writes to an array that it knows as a field of a named tuple is lost without a
# word, also where the loop reads that array. The same loop keeps it when it is compiled for one thread, and where a function does
# the writing.
#
# Guess: a field of a named tuple is an array as any other, in a parallel loop too.
# Seen: Numba takes the write for one to an array that nothing needs any more, and drops it (its issues 5872, 7135 and 10338).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numba==0.68.1 numpy==2.4.6

cat > "$folder/field.py" <<'PYTHON'
from typing import NamedTuple

import numba
import numpy as np


class Row(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def double(row):
    for i in numba.prange(row.x.size):
        row.y[i] = 2 * row.x[i]


@numba.njit
def put(row, i, value):
    row.y[i] = value


def double_by_a_function(row):
    for i in numba.prange(row.x.size):
        put(row, i, 2 * row.x[i])


def double_in_place(row):
    for i in numba.prange(row.x.size):
        row.y[i] = 2 * row.y[i]


SEEN = {
    (double, False): [2, 4, 6],
    (double, True): [7, 7, 7],
    (double_by_a_function, True): [2, 4, 6],
    (double_in_place, True): [7, 7, 7],
}
for (function, parallel), expected in SEEN.items():
    row = Row(np.array([1.0, 2, 3]), np.full(3, 7.0))
    numba.njit(parallel=parallel)(function)(row)
    print(function.__name__, "parallel" if parallel else "serial", row.y)
    assert row.y.tolist() == expected, f"seen before: {expected}"
PYTHON
"$folder/venv/bin/python" "$folder/field.py"
