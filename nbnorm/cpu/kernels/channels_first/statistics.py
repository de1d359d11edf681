"""The statistics of the rows of a block.

Sums of eight elements, or of each, are added up in float64, from a row's first element to its last: its bits depend on
nothing else.
"""

import functools

import numpy as np

from nbnorm.cpu.kernels.channels_first.blocks import gather, gather_rest, load_some, part_from
from nbnorm.cpu.kernels.modes import (
    DIFF_OF_SQUARES,
    DIFF_OF_SQUARES_64,
    MEAN_SQUARE,
    MEAN_SQUARE_COMPENSATED,
    ONE_SWEEP,
    TWO_SWEEPS,
)
from nbnorm.cpu.kernels.normalise import put, put_part
from nbnorm.cpu.kernels.row import moments_of, statistics_of, store_row, two_sum
from nbnorm.cpu.kernels.statistics import FLOAT32_SUMS, are_enough
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    at_least_zero,
    cast,
    choose,
    element_of,
    every,
    fill,
    load,
    multiply_add,
    smaller,
    store,
    widen,
)

# the modes in which sums may begin as float32 ones
IN_FLOAT32 = (ONE_SWEEP, DIFF_OF_SQUARES, MEAN_SQUARE)
# float64 sums about a number further than a standard deviation from the mean lose digits: those of 1,000 elements, with an
# outlier first, 658 eps of rstd
NEAR_MEAN = 1.0, 0.0, np.inf


@functools.cache
def finds_statistics(mode):
    """What finds the statistics of a block's rows, with means and variances; a buffer that holds all channels keeps them.

    What is computed in float32 has float32 sums of eight elements, where that is enough for the row.
    """
    has_mean = mode < MEAN_SQUARE
    finish = _finishes(has_mean, FLOAT32_SUMS if mode in IN_FLOAT32 else None)
    begin = begin_at_first if has_mean else begin_at_zero
    if mode == TWO_SWEEPS:
        first_sweep, first_finish = _sweep(begin, add_totals), finish_mean
        last_sweep, last_finish = _sweep(begin_at_mean, add_compensated), finish
    elif mode in IN_FLOAT32:
        first_sweep, first_finish = _sweep_in_float32(begin_near_mean if has_mean else begin_at_zero), finish
        last_sweep, last_finish = _sweep(begin, add_deviations), _finishes(has_mean, None)
    elif mode == DIFF_OF_SQUARES_64:
        # over 3,000 elements, y would be off by 20 eps in plain sums
        first_sweep, first_finish = _sweep(begin_near_mean, add_compensated), _finishes(has_mean, NEAR_MEAN)
        last_sweep, last_finish = _sweep(begin_at_mean, add_compensated), finish
    else:
        first_sweep = last_sweep = _sweep(begin, add_compensated if mode == MEAN_SQUARE_COMPENSATED else add_deviations)
        first_finish = last_finish = finish
    has_two_sweeps = first_sweep is not last_sweep

    @inlined
    def find_statistics(x, layout, block, eps, xs, sums, statistics):
        for j in range(0, block.count, 16):
            store(sums.variances, j, fill(np.nan))
        first_sweep(x, layout, block, False, xs, sums)
        for j in range(0, block.count, 16):
            first_finish(sums, j, layout.cols)
        if has_two_sweeps and not are_all_known(block, sums):
            last_sweep(x, layout, block, layout.cols <= layout.held, xs, sums)
            for j in range(0, block.count, 16):
                if not are_known(sums, j):
                    last_finish(sums, j, layout.cols)
        element = element_of(xs)
        for j in range(0, block.count, 16):
            moments = moments_of(load(sums.means, j), load(sums.rests, j), load(sums.variances, j), element)
            store_row(statistics, j, statistics_of(moments, eps, element))

    return find_statistics


@functools.cache
def _sweep(begin, add):
    """What adds up the elements of those rows of a block whose variance is not known; `has_all`: the buffer has them."""

    @inlined
    def sweep(x, layout, block, has_all, xs, sums):
        for c in range(0, layout.cols, layout.held):
            part = part_from(layout, c)
            if not has_all:
                gather(x, layout, block, part, xs)
            for j in range(0, block.count, 16):
                if not are_known(sums, j):
                    if c == 0:
                        clear_sums(sums, j)
                        begin(x, layout, block, j, xs, sums)
                    add(xs, j, layout.width, part.count, sums)

    return sweep


@functools.cache
def _sweep_in_float32(begin):
    """As `_sweep`, of all rows, whose sums begin as float32 ones."""

    @inlined
    def sweep(x, layout, block, has_all, xs, sums):
        for j in range(0, block.count, 16):
            clear_sums(sums, j)
            begin(x, layout, block, j, xs, sums)
        add_and_gather(x, layout, block, xs, sums)

    return sweep


@inlined
def add_and_gather(x, layout, block, xs, sums):
    """Add the deviations of all rows, eight channels at a time, whose elements go to the buffer: eight streams of memory."""
    pitch, width, count = layout.pitch, layout.width, block.count & 15
    for c in range(0, layout.cols, layout.held):
        part = part_from(layout, c)
        eights = part.count & -8
        for i in range(0, eights, 8):
            for j in range(0, block.count - count, 16):
                k = block.at + (c + i) * pitch + j
                add_eight(x, k, pitch, xs, i * width + j, width, sums, j)
        for i in range(eights, part.count):
            for j in range(0, block.count - count, 16):
                values = load(x, block.at + (c + i) * pitch + j)
                store(xs, i * width + j, values)
                add_one_channel(values, sums, j)
        if count:
            gather_rest(x, layout, block, part, xs)
            add_in_float32(xs, block.count - count, width, part.count, sums)


@functools.cache
def _finishes(has_mean, limits):
    """What finds the moments of sixteen rows from their sums. Of those of which the sums are not enough, it is NaN."""

    @inlined
    def finish(sums, j, cols):
        per_element = 1.0 / np.float64(cols)
        rests = fill(0.0)
        if has_mean:
            rests = (load(sums.totals, j) + load(sums.lost, j)) * per_element
        squared = (load(sums.squares, j) + load(sums.lost_squares, j)) * per_element
        variances = at_least_zero(squared - rests * rests)
        means, lost = two_sum(load(sums.shifts, j), 0.0, rests)
        if limits is not None:
            variances = choose(are_enough(rests, variances, limits), variances, fill(np.nan))
        known = load(sums.variances, j)
        is_new = known != known
        store(sums.means, j, choose(is_new, means, load(sums.means, j)))
        store(sums.rests, j, choose(is_new, lost, load(sums.rests, j)))
        store(sums.variances, j, choose(is_new, variances, known))

    return finish


@inlined
def are_known(sums, j):
    """Whether the variances of sixteen rows are."""
    variances = load(sums.variances, j)
    return every(variances == variances)


@inlined
def are_all_known(block, sums):
    count = 0
    for j in range(0, block.count, 16):
        count += are_known(sums, j)
    return 16 * count >= block.count


@inlined
def clear_sums(sums, j):
    zeros = fill(0.0)
    store(sums.totals, j, zeros)
    store(sums.squares, j, zeros)
    store(sums.lost, j, zeros)
    store(sums.lost_squares, j, zeros)


@inlined
def begin_at_zero(x, layout, block, j, xs, sums):
    store(sums.shifts, j, fill(0.0))


@inlined
def begin_at_first(x, layout, block, j, xs, sums):
    """The sums of a row are about its first element."""
    store(sums.shifts, j, widen(load(xs, j)))


@inlined
def begin_at_mean(x, layout, block, j, xs, sums):
    store(sums.shifts, j, load(sums.means, j))


@inlined
def begin_near_mean(x, layout, block, j, xs, sums):
    """The sums of a row are about the mean of eight elements, as `near_mean` has it."""
    cols, pitch, count = layout.cols, layout.pitch, smaller(16, block.count - j)
    at = block.at + j
    first = load_some(x, at, count) + load_some(x, at + (37 * cols >> 8) * pitch, count)
    second = load_some(x, at + (73 * cols >> 8) * pitch, count) + load_some(x, at + (110 * cols >> 8) * pitch, count)
    third = load_some(x, at + (146 * cols >> 8) * pitch, count) + load_some(x, at + (183 * cols >> 8) * pitch, count)
    fourth = load_some(x, at + (219 * cols >> 8) * pitch, count) + load_some(x, at + (255 * cols >> 8) * pitch, count)
    store(sums.shifts, j, widen(((first + second) + (third + fourth)) * element_of(xs)(0.125)))


@inlined
def add_totals(xs, j, width, channels, sums):
    """Add the deviations of sixteen rows, in as many channels as the buffer has."""
    shifts, totals = load(sums.shifts, j), load(sums.totals, j)
    for i in range(channels):
        totals = totals + (widen(load(xs, i * width + j)) - shifts)
    store(sums.totals, j, totals)


@inlined
def finish_mean(sums, j, cols):
    """The mean as far as the first of two sweeps finds it."""
    store(sums.means, j, load(sums.shifts, j) + load(sums.totals, j) * (1.0 / np.float64(cols)))


@inlined
def add_deviations(xs, j, width, channels, sums):
    """Add the deviations and their squares."""
    shifts, totals, squares = load(sums.shifts, j), load(sums.totals, j), load(sums.squares, j)
    for i in range(channels):
        d = widen(load(xs, i * width + j)) - shifts
        totals = totals + d
        squares = multiply_add(d, d, squares)
    store(sums.totals, j, totals)
    store(sums.squares, j, squares)


@inlined
def add_in_float32(xs, j, width, channels, sums):
    """As `add_and_gather`, of sixteen rows, whose elements are in the buffer."""
    for i in range(0, channels & -8, 8):
        add_eight(xs, i * width + j, width, xs, i * width + j, width, sums, j)
    for i in range(channels & -8, channels):
        add_one_channel(load(xs, i * width + j), sums, j)


@inlined
def add_eight(x, k, pitch, xs, at, width, sums, j):
    """Add the deviations of eight channels, in float32 sums of pairs, as in `shifted`, and copy them to the buffer."""
    shifts = cast(load(sums.shifts, j), np.float32)
    some_totals = some_squares = fill(np.float32(0))
    for half in range(0, 8, 4):
        x0, x1 = load(x, k + half * pitch), load(x, k + (half + 1) * pitch)
        x2, x3 = load(x, k + (half + 2) * pitch), load(x, k + (half + 3) * pitch)
        store(xs, at + half * width, x0)
        store(xs, at + (half + 1) * width, x1)
        store(xs, at + (half + 2) * width, x2)
        store(xs, at + (half + 3) * width, x3)
        d0, d1, d2, d3 = x0 - shifts, x1 - shifts, x2 - shifts, x3 - shifts
        some_totals = some_totals + ((d0 + d1) + (d2 + d3))
        some_squares = some_squares + (multiply_add(d1, d1, d0 * d0) + multiply_add(d3, d3, d2 * d2))
    store(sums.totals, j, load(sums.totals, j) + widen(some_totals))
    store(sums.squares, j, load(sums.squares, j) + widen(some_squares))


@inlined
def add_one_channel(values, sums, j):
    d = widen(values - cast(load(sums.shifts, j), np.float32))
    store(sums.totals, j, load(sums.totals, j) + d)
    store(sums.squares, j, multiply_add(d, d, load(sums.squares, j)))


@inlined
def add_compensated(xs, j, width, channels, sums):
    """As `add_deviations`, in sums that keep what rounding loses."""
    shifts, totals, squares = load(sums.shifts, j), load(sums.totals, j), load(sums.squares, j)
    lost, lost_squares = load(sums.lost, j), load(sums.lost_squares, j)
    for i in range(channels):
        d = widen(load(xs, i * width + j)) - shifts
        totals, lost = two_sum(totals, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
    store(sums.totals, j, totals)
    store(sums.squares, j, squares)
    store(sums.lost, j, lost)
    store(sums.lost_squares, j, lost_squares)


@inlined
def store_all_statistics(operands, block, sums, statistics):
    """Write mean and rstd of a block's rows, where they are asked for; no mean where the operands have none."""
    if operands.has_statistics:
        for j in range(0, block.count, 16):
            count = smaller(16, block.count - j)
            r = block.first + j
            if count == 16:
                put(operands.mean, r, load(sums.means, j) + load(sums.rests, j), False)
                put(operands.rstd, r, widen(load(statistics.rstd, j)), False)
            else:
                put_part(operands.mean, r, count, load(sums.means, j) + load(sums.rests, j), False)
                put_part(operands.rstd, r, count, widen(load(statistics.rstd, j)), False)
