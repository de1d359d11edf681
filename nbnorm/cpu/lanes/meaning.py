"""Sixteen elements of a row at once: what kernels are written in, so that the order of every sum is theirs.

The functions here say, in NumPy, what each operation means, and are what runs under NUMBA_DISABLE_JIT=1; `lowering` says
how it is compiled. A loop that LLVM vectorises sums in an order that depends on the processor and on the code around it;
these do not, so a row has the same bits in every kernel and on every processor with fused multiply-add.

Lanes are float32 or float64, and know the arithmetic and the comparisons that numbers know, with each other and with a
number of their type, which stands for sixteen of it. So one function serves a row, of which a number is known, and sixteen
rows, of which lanes are. In memory an element may be narrower: float16 arrives as uint16 and bfloat16 as int16, since Numba
has neither on the CPU.
"""

from typing import Any, NamedTuple

import numpy as np

COUNT = 16


class Operand(NamedTuple):
    """What `operand` returns, but for compiled code."""

    array: Any
    element: Any


class Added(NamedTuple):
    """What `added` returns of two operands, but for compiled code."""

    x: Any
    residual: Any


def shape_of(arrays):
    """The shape of an array, or of both in a tuple."""
    return _first(arrays).shape


def operand(arrays, element):
    """The elements of a C-contiguous array, or of the first of a tuple of two, which are read as the type `element`.

    Without the reference count that Numba keeps in every loop over an array. So it does not keep the array alive: something
    must refer to that for as long.
    """
    return Operand(_first(arrays).reshape(-1), element)


def operand_beside(arrays, element):
    """The same of the second of a tuple; None of a single array."""
    return Operand(arrays[1].reshape(-1), element) if isinstance(arrays, tuple) else None


def added(x, residual):
    """An operand whose elements are the sums of those of two, rounded to what those of x are in memory.

    It is x where the residual is None.
    """
    return x if residual is None else Added(x, residual)


def pointer(arrays):
    """As `operand`, of elements that are read as what they are. Numbers are written to it by `store`, since Numba leaves out
    what is set in an array that a loop knows by a field alone.
    """
    return _first(arrays).reshape(-1)


def pointer_beside(arrays):
    """The same of the second of a tuple; None of a single array."""
    return arrays[1].reshape(-1) if isinstance(arrays, tuple) else None


def holder(pointer):
    """The same pointer, to which only numbers are written that its type can hold."""
    return pointer


def reread(place, source):
    """What was written of an operand, or of a sum, as an operand."""
    return Operand(place, element_of(source))


def behind(source, k):
    """The elements of a pointer from k on; None of None."""
    return None if source is None else source[k:]


def column(source, at, pitch):
    """As an operand, the elements `at`, `at + pitch` and so on, for `load_one` and to `store` numbers; None of None."""
    if source is None:
        return None
    if isinstance(source, Added):
        return Added(column(source.x, at, pitch), column(source.residual, at, pitch))
    return Operand(_stored(source)[at::pitch], element_of(source))


def element_of(source):
    """The type that the elements of an operand are read as."""
    if isinstance(source, Added):
        return source.x.element
    return source.element if isinstance(source, Operand) else source.dtype.type


def standard_mode(operands):
    """Have the thread round to nearest even, and take subnormal numbers as they are; `control` says how.

    Returns the mode that it had, and the operands, a tuple, of which nothing is read or computed before.
    """
    return None, operands


def restore_mode(thread_mode):
    """Give the thread its mode back; all that was computed is stored before."""


def load(source, k):
    """Elements k to k + 15, as lanes; None of None."""
    if source is None:
        return None
    if isinstance(source, Added):
        return _sum(source, load(source.x, k), load(source.residual, k))
    return _decoded(_stored(source)[k : k + COUNT], element_of(source))


def load_part(source, k, count, rest):
    """The `count` < 16 elements from k on; the other lanes are `rest`, a float64. None of None."""
    if source is None:
        return None
    element = element_of(source)
    if isinstance(source, Added):
        sums = _sum(source, load_part(source.x, k, count, 0.0), load_part(source.residual, k, count, 0.0))
        return np.where(np.arange(COUNT) < count, sums, element(rest))
    lanes = np.full(COUNT, rest, element)
    lanes[:count] = _decoded(_stored(source)[k : k + count], element)
    return lanes


def keep(lanes, count):
    """The first `count` lanes; the others become 0."""
    return np.where(np.arange(COUNT) < count, lanes, lanes.dtype.type(0))


def load_one(source, k):
    """Element k as a float64."""
    if isinstance(source, Added):
        element = element_of(source)
        values = (np.full(1, load_one(part, k), np.float64).astype(element) for part in source)
        return np.float64(_sum(source, *values)[0])
    return _decoded(_stored(source)[k : k + 1], np.float64)[0]


def number(source, k):
    """Element k of a pointer, as it is; None of None."""
    return None if source is None else source[k]


def store(destination, k, values):
    """Write elements k to k + 15, each rounded once, to nearest even; of a number, element k. Nothing to None."""
    if destination is None:
        return
    stored = _stored(destination)
    stored[k : k + np.size(values)] = _encoded(np.atleast_1d(values), stored.dtype)


def store_part(destination, k, count, lanes):
    """Write the `count` < 16 elements from k on."""
    stored = _stored(destination)
    stored[k : k + count] = _encoded(lanes[:count], stored.dtype)


def stream(destination, k, lanes):
    """As `store`, past the caches, which spares reading the line first; the address is a multiple of 16 bytes."""
    store(destination, k, lanes)


def stream_part(destination, k, count, lanes):
    """As `store_part`, past the caches; the bytes written are a multiple of 16 too."""
    store_part(destination, k, count, lanes)


def until_aligned(destination, k):
    """How many elements there are from k to the first whose address is a multiple of the size of sixteen; 0 of None."""
    if destination is None:
        return 0
    stored = _stored(destination)
    return -(stored.ctypes.data // stored.itemsize + k) % COUNT


def fence():
    """Make what was streamed visible to other threads."""


def prefetch(source, k, ahead):
    """Ask for the cache line of element k + ahead, which may be one that does not exist; for none where ahead is None."""


def fill(value):
    """Sixteen times a float32 or float64."""
    return np.full(COUNT, value, type(value))


def fill_for(destination, value):
    """The same for what goes to a destination; None where that is None."""
    return None if destination is None else fill(value)


def widen(values):
    """As float64."""
    return cast(values, np.float64)


def cast(values, element):
    """As the type `element`, rounded once."""
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(element)[()]


def multiply_add(a, b, c):
    """The value of a * b + c, rounded once where the processor can; b may be None for 1, and c for 0. One is lanes."""
    product = a if b is None else a * b
    return product if c is None else product + c


def total(lanes):
    """The sum of the lanes, halves first."""
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes[0]


def scratch(count, element):
    """Room for `count` elements, whatever they are, for as long as the call of the kernel; it begins with a cache line."""
    # NumPy would warn of what becomes of others in lanes that nothing reads
    return np.ones(count, element)


def store_folded(destination, k, lanes):
    """Write eight elements: the sums of the lanes that are eight apart, with which `total` begins. These may be wider."""
    destination[k : k + COUNT // 2] = lanes[: COUNT // 2] + lanes[COUNT // 2 :]


def totals(source, k):
    """As lanes, what `total` would be of each of sixteen that were written by `store_folded`, one behind the other."""
    lanes = source[k : k + COUNT * COUNT // 2].reshape(COUNT, COUNT // 2)
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes[:, 0]


def root(values):
    """The square root of each."""
    return np.sqrt(values)


def every(condition):
    """Whether a comparison holds, of lanes for each of them."""
    return bool(np.all(condition))


def choose(condition, values, others):
    """The lanes of the first where a comparison holds, else those of the second."""
    return np.where(condition, values, others)


def at_least_zero(values):
    """0 instead of what is below; NaN stays NaN."""
    return np.maximum(values, np.float64(0))


def larger(a, b):
    """The larger of two numbers, as `max` has it: the first where one is NaN."""
    return max(a, b)


def smaller(a, b):
    """The smaller of two numbers, as `min` has it."""
    return min(a, b)


def to_odd(values):
    """Float32 from float64 with the last bit set where inexact: the next rounding is then as if it were the only one."""
    with np.errstate(all="ignore"):
        near = values.astype(np.float32)
        bits = near.view(np.uint32)
        is_inexact = (near != values) & (bits & 1 == 0) & (values == values)
        step = np.where(np.abs(near) < np.abs(values), 1, -1)
    return np.where(is_inexact, bits + step, bits).astype(np.uint32).view(np.float32)


def _first(arrays):
    return arrays[0] if isinstance(arrays, tuple) else arrays


def _sum(source, a, b):
    with np.errstate(all="ignore"):
        return _decoded(_encoded(a + b, _stored(source.x).dtype), element_of(source))


def _stored(source):
    return source.array if isinstance(source, Operand) else source


def _decoded(stored, element):
    if stored.dtype == np.uint16:
        stored = stored.view(np.float16)
    elif stored.dtype == np.int16:
        stored = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.astype(element)


def _encoded(lanes, dtype):
    with np.errstate(all="ignore"):
        if dtype == np.uint16:
            return lanes.astype(np.float16).view(np.uint16)
        if dtype == np.int16:
            return _bfloat16(lanes)
        return lanes.astype(dtype)


def _bfloat16(lanes):
    """The upper half as a float32, to nearest even, rounded once."""
    bits = to_odd(lanes).view(np.uint32)
    rounded = np.where(np.isnan(lanes), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
    return (rounded >> 16).astype(np.uint16).view(np.int16)
