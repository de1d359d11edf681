"""Rows of x plus a residual: each sum is found once, and kept where the norm reads it twice.

So the total is written before y, not in turns with it, and no sum is rounded to 16 bits twice.
"""

import functools

from nbnorm.cpu.kernels.normalise import ForwardOperands, put, put_part
from nbnorm.cpu.kernels.statistics import AHEAD
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    behind,
    holder,
    larger,
    load,
    load_part,
    prefetch,
    reread,
    scratch,
    smaller,
    store,
    store_part,
)

# elements of the rows whose sums are found before their norms, if they are several; on an Intel Xeon, with 2^13 float32
# rows of 768 take 1.1 times as long
ELEMENTS = 1 << 11
# bytes of the sums that are kept beside results which are written past the caches, on a thread's stack
ROOM_BYTES = 1 << 17


@functools.cache
def norms_of_sums(rows_from, x_dtype, multiple):
    """As `rows_from`, of x plus a residual, for a multiple of so many rows at a time."""
    room_elements = ROOM_BYTES // x_dtype.itemsize

    @inlined
    def sums_from(operands, begin, end, streaming):
        cols = operands.cols
        step = larger(multiple, ELEMENTS // cols // multiple * multiple)
        ahead = cols * -(-AHEAD // cols)
        room = scratch(room_elements, x_dtype.type)
        r = begin
        while r < end:
            count = smaller(step, end - r)
            rows_from(kept(operands, r, count, ahead, room, room_elements, streaming), 0, count, streaming)
            r += count

    return sums_from


@inlined
def kept(operands, r, count, ahead, room, room_elements, streaming):
    """The operands of `count` rows from row r on, of which x is the sum; writes that, and the total."""
    at, elements = r * operands.cols, count * operands.cols
    # what passes the caches is not read again from memory
    is_in_room = streaming and elements <= room_elements
    y, total = behind(operands.y, at), behind(operands.total, at)
    place = place_of(y, total, room, is_in_room)
    part = elements & 15
    end = elements - part
    for k in range(0, end, 16):
        prefetch(operands.x, at + k, ahead)
        sums = load(operands.x, at + k)
        store(place, k, sums)
        if is_in_room:
            put(total, k, sums, True)
    if part:
        sums = load_part(operands.x, at + end, part, 0.0)
        store_part(place, end, part, sums)
        if is_in_room:
            put_part(total, end, part, sums, True)
    return ForwardOperands(
        reread(place, operands.x), operands.weight, operands.bias, y, None, behind(operands.mean, r),
        behind(operands.rstd, r), operands.has_statistics, operands.rows, operands.cols, operands.eps,
    )  # fmt: skip


@inlined
def place_of(y, total, room, is_in_room):
    """Where sums are kept: in the total, or in y, whose elements are written once the sum there has been read."""
    place = holder(y) if total is None else total
    if is_in_room:
        place = holder(room)
    return place
