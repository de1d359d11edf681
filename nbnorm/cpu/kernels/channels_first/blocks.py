"""Blocks of rows that lie beside each other, and the buffers that they are worked on in.

The arrays have three dimensions: what is before the axis, the axis, and what is behind it. The elements of a row are as far
apart as the last dimension is long, and those of neighbouring rows follow each other: sixteen rows are sixteen lanes.

A block's elements are first copied to a buffer, since elements that are a power of two apart share a few places of each
cache. Of long rows, the buffer holds some channels at a time.
"""

from typing import Any, NamedTuple

import numpy as np

from nbnorm.cpu.kernels.row import KNOWN_NUMBERS, known_in
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import behind, every, larger, load, load_part, scratch, smaller, store
from nbnorm.cpu.sizes import MOST_ABREAST

# numbers that are kept of all rows of a block: eight while sums are taken, and what is known of them
SUMS_SIZE = 8 * MOST_ABREAST
KNOWN_SIZE = KNOWN_NUMBERS * MOST_ABREAST


class Layout(NamedTuple):
    """How long rows are, how far apart their elements, how many rows a block has, channels a buffer holds, and the lead."""

    cols: Any
    pitch: Any
    width: Any
    held: Any
    lead: Any


class Block(NamedTuple):
    """Rows that are worked on together: where the first begins in x, which it is, and how many they are."""

    at: Any
    first: Any
    count: Any


class Part(NamedTuple):
    """Some channels of a block: the first of them, and how many they are."""

    first: Any
    count: Any


class KeptSums(NamedTuple):
    """Where the sums of a block's rows are kept, what they are about, what rounding lost of them, and the moments."""

    shifts: Any
    totals: Any
    squares: Any
    lost: Any
    lost_squares: Any
    means: Any
    rests: Any
    variances: Any


@inlined
def block_of(layout, b):
    """Block b of those that the rows behind each index before the axis are cut into."""
    cols, pitch, width, _, lead = layout
    blocks = -(-(pitch + lead) // width)
    outer = b // blocks
    begin = (b - outer * blocks) * width - lead
    first = larger(begin, 0)
    return Block(outer * cols * pitch + first, outer * pitch + first, smaller(begin + width, pitch) - first)


@inlined
def part_from(layout, channel):
    """The channels from this one on, as many as a buffer holds."""
    return Part(channel, smaller(layout.held, layout.cols - channel))


@inlined
def room_for_sums():
    room = scratch(SUMS_SIZE, np.float64)
    return KeptSums(
        room, behind(room, MOST_ABREAST), behind(room, 2 * MOST_ABREAST), behind(room, 3 * MOST_ABREAST),
        behind(room, 4 * MOST_ABREAST), behind(room, 5 * MOST_ABREAST), behind(room, 6 * MOST_ABREAST),
        behind(room, 7 * MOST_ABREAST),
    )  # fmt: skip


@inlined
def room_for_known(element):
    return known_in(scratch(KNOWN_SIZE, element), MOST_ABREAST)


@inlined
def gather(source, layout, block, part, buffer):
    """Copy a part of a block to a buffer, in which channels are `width` apart."""
    for i in range(part.count):
        k = block.at + (part.first + i) * layout.pitch
        for j in range(0, block.count & -16, 16):
            store(buffer, i * layout.width + j, load(source, k + j))
    if block.count & 15:
        gather_rest(source, layout, block, part, buffer)


@inlined
def gather_rest(source, layout, block, part, buffer):
    """As `gather`, of the last rows of a block, fewer than sixteen."""
    count = block.count & 15
    j = block.count - count
    for i in range(part.count):
        # rows that are not there are ordinary ones, even without eps
        rest = np.float64((part.first + i) & 1)
        k = block.at + (part.first + i) * layout.pitch + j
        store(buffer, i * layout.width + j, load_part(source, k, count, rest))


@inlined
def load_some(source, k, count):
    """Elements k to k + count - 1, of sixteen at most; the other lanes are 0. None of None."""
    return load(source, k) if count == 16 else load_part(source, k, count, 0.0)


@inlined
def are_ordinary(variances, eps, bounds):
    """As `is_ordinary`, of each lane."""
    smallest, largest = bounds
    shifted = variances + eps
    return (smallest <= shifted) & (shifted <= largest)


@inlined
def are_all_ordinary(sums, j, eps, bounds):
    """Whether the sixteen rows of a block from j on are."""
    return every(are_ordinary(load(sums.variances, j), eps, bounds))


@inlined
def ordinary_until(begin, block, eps, bounds, sums):
    """Where the sixteens of a block from `begin` on end that are ordinary."""
    end = begin
    while end < block.count and are_all_ordinary(sums, end, eps, bounds):
        end += 16
    return smaller(end, block.count)
