"""Sixteen elements of a row at once: what kernels are written in, so that the order of every sum is theirs.

The functions here say, in NumPy, what each operation means, and are what runs under NUMBA_DISABLE_JIT=1; `lowering` says
how it is compiled. A loop that LLVM vectorises sums in an order that depends on the processor and on the code around it;
these do not, so a row has the same bits in every kernel and on every processor with fused multiply-add.

Lanes are float32 or float64 and know +, - and *. In memory an element may be narrower: float16 arrives as uint16 and
bfloat16 as int16, since Numba has neither on the CPU.
"""

import numpy as np

COUNT = 16


def pointer(array):
    """The elements of a C-contiguous array, without the reference count that Numba keeps in every loop over an array.

    So it does not keep the array alive: something must refer to that for as long.
    """
    return array.reshape(-1)


def standard_mode(operands):
    """Have the thread round to nearest even, and take subnormal numbers as they are; `control` says how.

    Returns the mode that it had, and the operands, a tuple, of which nothing is read or computed before.
    """
    return None, operands


def restore_mode(thread_mode):
    """Give the thread its mode back; all that was computed is stored before."""


def load(source, k, element):
    """Elements k to k + 15, as lanes of the type `element`; None of None."""
    if source is None:
        return None
    return _decoded(source[k : k + COUNT], element)


def load_part(source, k, count, element, rest):
    """The `count` < 16 elements from k on; the other lanes are `rest`. None of None."""
    if source is None:
        return None
    lanes = np.full(COUNT, rest, element)
    lanes[:count] = _decoded(source[k : k + count], element)
    return lanes


def keep(lanes, count):
    """The first `count` lanes; the others become 0."""
    return np.where(np.arange(COUNT) < count, lanes, lanes.dtype.type(0))


def load_one(source, k):
    """Element k as a float64."""
    return _decoded(source[k : k + 1], np.float64)[0]


def store(destination, k, lanes):
    """Write elements k to k + 15, each rounded once, to nearest even."""
    destination[k : k + COUNT] = _encoded(lanes, destination.dtype)


def store_part(destination, k, count, lanes):
    """Write the `count` < 16 elements from k on."""
    destination[k : k + count] = _encoded(lanes[:count], destination.dtype)


def store_one(destination, k, value):
    """Write a float64 to element k, rounded once."""
    destination[k : k + 1] = _encoded(np.full(1, value), destination.dtype)


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
    address = destination.ctypes.data // destination.itemsize + k
    return -address % COUNT


def fence():
    """Make what was streamed visible to other threads."""


def prefetch(source, k, ahead):
    """Ask for the cache line of element k + ahead, which may be one that does not exist; for none where ahead is None."""


def fill(value):
    """Sixteen times a float32 or float64."""
    return np.full(COUNT, value, type(value))


def widen(lanes):
    """As float64."""
    return lanes.astype(np.float64)


def multiply_add(a, b, c):
    """The value of a * b + c, rounded once where the processor can; b may be None for 1, and c for 0."""
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


def cast(lanes, element):
    """As the type `element`, rounded once."""
    return lanes.astype(element)


def root(lanes):
    """The square root of each."""
    return np.sqrt(lanes)


def at_least_zero(lanes):
    """0 instead of what is below; NaN stays NaN."""
    return np.maximum(lanes, lanes.dtype.type(0))


def all_below(a, b):
    """Whether each lane of a is below that of b; NaN is not."""
    return bool((a < b).all())


def to_odd(values):
    """Float32 from float64 with the last bit set where inexact: the next rounding is then as if it were the only one."""
    with np.errstate(all="ignore"):
        near = values.astype(np.float32)
        bits = near.view(np.uint32)
        is_inexact = (near != values) & (bits & 1 == 0) & (values == values)
        step = np.where(np.abs(near) < np.abs(values), 1, -1)
    return np.where(is_inexact, bits + step, bits).astype(np.uint32).view(np.float32)


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


def larger(a, b):
    """The larger of two numbers, as `max` has it: the first where one is NaN."""
    return max(a, b)


def smaller(a, b):
    """The smaller of two numbers, as `min` has it."""
    return min(a, b)
