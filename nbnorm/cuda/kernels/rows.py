"""A row between memory and the registers of a team of threads: `values` is one thread's share of it.

What is beyond the row's end is its first element where statistics are computed, else 0. Only from vector `made.complete` on
can there be any.
"""

import numpy as np
from numba import cuda

from nbnorm.cuda.instructions.meaning import fetch, load, round_as, store, unpack
from nbnorm.cuda.kernels.known import Means, Segment, Start, Statistics
from nbnorm.cuda.kernels.reduce import inlined

# numbers of a state, which are `Statistics`, and of means in memory, which are `Means`
STATE = len(Statistics._fields)
MEANS = len(Means._fields)
# elements of the widest vector
WIDEST = 8


@inlined
def first_of_warp(begin, thread, made):
    """The first row that the thread's warp has, in a block of which `begin` is the first."""
    return begin if made.tile.is_abreast else begin + thread.team - thread.before


@inlined
def row_of(first, before, rows, made):
    """A team's row, where its warp's first one is that and the teams before it in the warp have the next ones.

    A team without a row does the last one's work, since all of a warp must take part in a sum, and stores nothing.
    """
    return min(first + before, rows - 1) if made.shares_warp else first


@inlined
def segment_of(number, cols, segments, segment_cols, made):
    """The segment of that number, where all of a row follow each other, and then those of the next one; or a whole row."""
    if made.is_whole:
        return Segment(number, np.int64(0), np.int64(0), cols)
    # next to each other, the two are one division
    part = number % segments
    row = number // segments
    first = part * segment_cols
    # the mask tells the compiler that it is small, which spares 64-bit work
    return Segment(row, part, first, min(segment_cols, cols - first) & 0xFFFF)


@inlined
def place_of(row, cols, share):
    """The row's number; of one that lies abreast, the elements before it: as many rows as columns are apart lie beside each
    other, and then those of the next index before.
    """
    return row + row // share.apart * (cols - 1) * share.apart if share.made.tile.is_abreast else row


@inlined
def column(share, k):
    """The first column of vector k."""
    return (share.lane + k * share.made.tile.team) * share.made.tile.width


@inlined
def has(share, k):
    """Whether vector k is one of the row's."""
    return k < share.made.complete or column(share, k) < share.cols


@inlined
def start_of(rows, place):
    return Start(rows.memory, place * rows.pitch + rows.first)


@inlined
def element_at(start, element):
    value = cuda.local.array(1, element)
    load(value, 0, start.memory, start.at, 1, 1)
    return value[0]


@inlined
def sum_at(start, residual, made):
    """Of x + residual the element that starts there, in x's type; of x where nothing is added."""
    value = cuda.local.array(1, made.element)
    load(value, 0, start.memory, start.at, 1, 1)
    if made.is_added:
        value[0] += element_at(residual, made.element)
        round_as(value, 0, start.memory, start.at, 1, made.rounds_pairs)
    return value[0]


@inlined
def load_row(values, start, share, access, beyond):
    """The row that starts there, and what is to be beyond its end."""
    tile = share.made.tile
    for k in range(tile.held):
        if has(share, k):
            load(values, k * tile.width, start.memory, start.at + column(share, k) * share.apart, tile.width, access)
        else:
            fill(values, k, share, beyond)


@inlined
def add_to_row(values, start, share):
    """Add the row that starts there."""
    made, tile = share.made, share.made.tile
    added = cuda.local.array(WIDEST, made.element)
    for k in range(tile.held):
        if has(share, k):
            load(added, 0, start.memory, start.at + column(share, k) * share.apart, tile.width, made.added_access)
            for i in range(tile.width):
                values[k * tile.width + i] += added[i]


@inlined
def add_rounded(values, residual, start, share):
    """Add the row of the residual, and round to the type of what starts at `start`."""
    add_to_row(values, residual, share)
    tile = share.made.tile
    for k in range(tile.held):
        if has(share, k):
            round_as(values, k * tile.width, start.memory, start.at, tile.width, share.made.rounds_pairs)


@inlined
def fetch_row(ahead, start, share, access):
    """Begin to load a row, of which `unpack_row` is the end."""
    tile = share.made.tile
    for k in range(tile.held):
        if has(share, k):
            fetch(ahead, k * tile.width, start.memory, start.at + column(share, k) * share.apart, tile.width, access)


@inlined
def fetch_rows(ahead, operands, place, share):
    """Of x and of dy, if they are needed."""
    if share.made.has_x:
        fetch_row(ahead.x, start_of(operands.x, place), share, share.made.access)
    if share.made.has_dy:
        fetch_row(ahead.dy, start_of(operands.dy, place), share, share.made.dy_access)


@inlined
def unpack_row(values, memory, ahead, share, access, beyond):
    tile = share.made.tile
    for k in range(tile.held):
        if has(share, k):
            unpack(values, k * tile.width, memory, ahead, tile.width, access)
        else:
            fill(values, k, share, beyond)


@inlined
def unpack_rows(values, ahead, operands, origin, share):
    """Of x, with its first element beyond the end, and of dy."""
    made = share.made
    if made.has_x:
        unpack_row(values.x, operands.x.memory, ahead.x, share, made.access, origin)
    if made.has_dy:
        unpack_row(values.dy, operands.dy.memory, ahead.dy, share, made.dy_access, made.element(0))


@inlined
def fill(values, k, share, value):
    """All of vector k."""
    width = share.made.tile.width
    for i in range(width):
        values[k * width + i] = value


@inlined
def store_row(values, start, share, access, rounds_pairs):
    tile = share.made.tile
    for k in range(tile.held):
        if has(share, k):
            at = start.at + column(share, k) * share.apart
            store(values, k * tile.width, start.memory, at, tile.width, access, rounds_pairs)


@inlined
def add_row(values, before, start, is_begun, share):
    """Add the row to what starts there, in the type that it is computed in, where something does."""
    made = share.made
    if is_begun:
        load_row(before, start, share, made.sums_access, made.element(0))
        for i in range(made.tile.size):
            values[i] += before[i]
    store_row(values, start, share, made.sums_access, 0)


@inlined
def keep_segment(states, at, statistics, cols):
    """Of so many columns; of which the sum of squared deviations is kept."""
    factor, hi, lo, var = statistics
    keep_statistics(states, at, Statistics(factor, hi, lo, var * cols))


@inlined
def keep_statistics(states, at, statistics):
    states[at * STATE] = statistics.factor
    states[at * STATE + 1] = statistics.hi
    states[at * STATE + 2] = statistics.lo
    states[at * STATE + 3] = statistics.var


@inlined
def statistics_of(states, at):
    return Statistics(states[at * STATE], states[at * STATE + 1], states[at * STATE + 2], states[at * STATE + 3])


@inlined
def keep_means(memory, at, means):
    memory[at * MEANS] = means.g
    memory[at * MEANS + 1] = means.gx
    memory[at * MEANS + 2] = means.shift


@inlined
def means_of(memory, at):
    return Means(memory[at * MEANS], memory[at * MEANS + 1], memory[at * MEANS + 2])
