"""What hypothesis draws calls from: shapes, values of any kind, and arrays that lie anywhere in memory of their own."""

import math
import tempfile
from dataclasses import dataclass, field
from typing import NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# exponents of the largest finite number and of the smallest subnormal one
EXPONENTS = {"float16": (15, -24), "bfloat16": (127, -133), "float32": (127, -149), "float64": (1023, -1074)}

BATCHES = st.lists(st.integers(1, 5), max_size=2) | st.sampled_from([[17], [33], [2, 40], [0], [3, 0]])
# around the 16 elements that kernels take at once, and the 128 that they sum at once
ROWS = st.lists(st.integers(1, 6), min_size=1, max_size=2) | st.sampled_from(
    [[15], [16], [17], [33], [2, 16], [127], [128], [129], [3, 48], [300], [0], [2, 0]]
)
# none of which is 0
FULL_BATCHES = st.lists(st.integers(1, 5), max_size=2)
FULL_ROWS = st.lists(st.integers(2, 6), min_size=1, max_size=2) | st.sampled_from([[16], [17], [40]])
EPS = st.sampled_from([1e-5, 1e-5, 1e-5, 0.0, 1e-12, 1e-300, 0.1, 1e3, 1, np.float32(1e-3)])


PLAIN = ("plain", "plain", "integers", "constant")
KINDS = (*PLAIN, "nearly constant", "far", "outlier", "scaled", "not finite")


@st.composite
def values(draw, rng, shape, dtype, kinds=KINDS):
    """Rows of a dtype, which may be hard to normalise."""
    rows, cols = shape
    z = rng.standard_normal(shape)
    if dtype.kind in "biu":
        return rng.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    most, least = EXPONENTS[dtype.name]
    kind = draw(st.sampled_from(kinds))
    if kind == "integers":
        z = rng.integers(-5, 5, shape)
    elif kind == "constant":
        z = np.broadcast_to(z[:, :1], shape)
    elif kind == "nearly constant" and cols:
        z = np.broadcast_to(z[:, :1], shape).copy()
        z[:, rng.integers(cols)] *= 1 + 2.0 ** -draw(st.integers(1, 50))
    elif kind == "far":
        z = z + 10.0 ** draw(st.integers(1, 12 if dtype.itemsize == 8 else 6 if most > 15 else 3))
    elif kind == "outlier" and cols:
        z[:, rng.integers(cols)] = 1e4
    elif kind == "scaled":
        # each row by another power of two, or all by one
        count = draw(st.sampled_from([1, rows]))
        with np.errstate(all="ignore"):
            z = np.ldexp(z + draw(st.sampled_from([0, 0, 100])), rng.integers(least, most + 1, (count, 1)))
    elif kind == "not finite" and z.size:
        z.flat[rng.integers(z.size, size=draw(st.integers(1, 3)))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    with np.errstate(all="ignore"):
        result = z.astype(dtype)
        # beyond its range only where that is the kind
        largest = np.array(2.0**most, np.float64).astype(dtype)
        return result if kind == "not finite" else np.where(np.isinf(result), np.sign(z).astype(dtype) * largest, result)


class Layout(NamedTuple):
    """How an array lies in its memory: axes from the slowest to the fastest, steps along them, and gaps after them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...]
    steps: tuple[int, ...]
    gaps: tuple[int, ...]

    @property
    def extents(self):
        return [abs(self.steps[i]) * self.shape[i] + self.gaps[i] for i in self.order]

    @property
    def nbytes(self):
        return math.prod(self.extents) * self.dtype.itemsize

    def view(self, memory, start):
        """The array whose memory begins with this byte."""
        whole = memory[start : start + self.nbytes].view(self.dtype).reshape(self.extents)
        steps = tuple(slice(None, None, step) for step in self.steps)
        return whole.transpose(np.argsort(self.order))[steps][tuple(slice(n) for n in self.shape)]


@st.composite
def layouts(draw, shape, dtype):
    axes = range(len(shape))
    if draw(st.booleans()):
        return Layout(shape, dtype, tuple(axes), (1,) * len(shape), (0,) * len(shape))
    if draw(st.integers(0, 3)) == 0:
        dtype = dtype.newbyteorder("S")
    order = tuple(draw(st.permutations(axes)))
    steps = draw(st.tuples(*(st.sampled_from([1, 1, -1, 2, -3]) for _ in axes)))
    gaps = draw(st.tuples(*(st.sampled_from([0, 0, 1]) for _ in axes)))
    return Layout(shape, dtype, order, steps, gaps)


class Memories:
    """All memory of a call, random wherever no array is, and what it held before."""

    def __init__(self, rng):
        self.rng = rng
        self.written = []
        self.snapshots = []

    def allocate(self, nbytes, in_file=False):
        size = max(nbytes, 1)
        memory = np.empty(size, np.uint8)
        if in_file:
            with tempfile.TemporaryFile() as file:
                memory = np.memmap(file, np.uint8, "w+", shape=size)
        memory[:] = self.rng.integers(0, 256, size, np.uint8)
        self.snapshots.append([memory, None])
        return memory

    def may_be_written(self, view):
        self.written.append([view, None])

    def remember(self):
        for entry in (*self.snapshots, *self.written):
            entry[1] = entry[0].copy()

    def assert_nothing_else_was_written(self):
        for view, before in self.written:
            view[...] = before
        for memory, before in self.snapshots:
            np.testing.assert_array_equal(memory, before)


@dataclass
class Operand:
    """An input as a plain array and as one that lies somewhere, with its layout and first byte in its memory."""

    plain: np.ndarray
    placed: np.ndarray
    layout: Layout
    memory: np.ndarray = field(repr=False)
    start: int


# bytes before and behind an array, for others that overlap it
SLACK = 64


@st.composite
def operands(draw, memories, plain):
    """An input that lies anywhere: strided, unaligned, in a file, read-only, or repeated along some axes."""
    shape = plain.shape
    if plain.size and draw(st.integers(0, 5)) == 0:
        # without memory of its own along some axes
        once = tuple(slice(1) if draw(st.booleans()) else slice(None) for _ in shape)
        plain = np.broadcast_to(plain[once], shape).copy()
        layout = draw(layouts(plain[once].shape, plain.dtype))
    else:
        once = ()
        layout = draw(layouts(shape, plain.dtype))
    memory = memories.allocate(layout.nbytes + 2 * SLACK, in_file=draw(st.integers(0, 9)) == 0)
    start = SLACK + draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 9]))
    view = layout.view(memory, start)
    view[...] = plain[once]
    placed = np.broadcast_to(view, shape) if once else view
    if draw(st.integers(0, 5)) == 0:
        placed = placed.view()
        placed.flags.writeable = False
    return Operand(plain, placed, layout, memory, start)


def is_own(operand):
    """Whether each element has memory of its own that may be written."""
    return operand.placed.flags.writeable and operand.placed.shape == operand.layout.shape


@st.composite
def outs(draw, memories, shape, dtype, *overlapped):
    """A result's array: in memory of its own, or over one of these operands, in place, shifted or reversed."""
    candidates = [o for o in overlapped if is_own(o) and o.placed.shape == shape and o.plain.dtype == dtype]
    if candidates and draw(st.booleans()):
        operand = draw(st.sampled_from(candidates))
        shift = draw(st.sampled_from([0, 0, *(sign * n for n in (1, dtype.itemsize, 16, SLACK - 9) for sign in (1, -1))]))
        view = operand.layout.view(operand.memory, operand.start + shift)
        if draw(st.booleans()):
            view = view[tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape)]
        elif shift == 0:
            view = operand.placed
    else:
        layout = draw(layouts(shape, dtype))
        memory = memories.allocate(layout.nbytes + 2 * SLACK, in_file=draw(st.integers(0, 9)) == 0)
        view = layout.view(memory, SLACK + draw(st.sampled_from([0, 0, 0, 1, 2, 4])))
    memories.may_be_written(view)
    return view
