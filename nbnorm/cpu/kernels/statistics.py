"""The mean and the variance of a row, or of a part of one, in one sweep over it or in two.

Sums are float64, but for those of a few elements.
"""

import numpy as np

from nbnorm.cpu.kernels.modes import (
    DIFF_OF_SQUARES,
    DIFF_OF_SQUARES_64,
    MEAN_SQUARE,
    MEAN_SQUARE_COMPENSATED,
    ONE_SWEEP,
    TWO_SWEEPS,
    VARIANCE_BOUNDS,
    is_centred,
    mode_of,
)
from nbnorm.cpu.kernels.row import Span, Sums, moments_of, two_sum
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    at_least_zero,
    cast,
    element_of,
    every,
    fill,
    keep,
    load,
    load_one,
    load_part,
    multiply_add,
    prefetch,
    total,
    widen,
)

# a float32 sum of products is enough where it is far from overflow and underflow
SMALLEST, LARGEST = 2.0**-80, 2.0**80
# sums are enough for a variance that is between two numbers, and that the square of the mean's distance from the shift is at
# most so many times of: float32 sums for float32's digits, float64 sums for these, and for there to be any of float64's
FLOAT32_SUMS = 1.0, SMALLEST, LARGEST
FLOAT64_SUMS = 2.0**28, 0.0, np.inf
FLOAT64_SUMS_64 = 2.0**42, 0.0, np.inf
# elements whose float32 sums are taken before float64 goes on; rows of fewer have float64 sums alone
BLOCK = 128
# how many elements ahead of the statistics memory is read: at least so many, at (4096, 4096) 512 takes 1.1 times as long
AHEAD = 2048


def finds_moments(statistics_from, x_dtype, dtype):
    """The mode, the function that finds the moments in it, and the bounds of the variance of ordinary rows."""
    mode = mode_of(statistics_from, x_dtype, dtype)
    compensating = {TWO_SWEEPS: compensated, MEAN_SQUARE_COMPENSATED: compensated_squares}
    find = compensating.get(mode) or (moments if is_centred(statistics_from) else mean_square)
    return mode, find, VARIANCE_BOUNDS[dtype.name]


def finds_both(statistics_from):
    """The function that finds the moments in a mode of float32, and the sums of g with them."""
    return moments_and_sums if is_centred(statistics_from) else mean_square_and_sums


@inlined
def moments(x, span, mode, ahead):
    """The moments, in any mode that is not compensated; prefetches what is `ahead` of each element, unless None."""
    found, _ = moments_and_sums(None, x, None, span, 0.0, mode, ahead)
    return found


@inlined
def moments_and_sums(dy, x, weight, span, g_shift, mode, ahead):
    """The moments, and the sums of g from the same sweeps, NaN where dy is None; dy is for rows computed in float32."""
    is_diff_of_squares = mode == DIFF_OF_SQUARES or mode == DIFF_OF_SQUARES_64
    first = load_one(x, span.at)
    shift = 0.0
    if not is_diff_of_squares:
        shift = near_mean(x, span) if span.cols >= BLOCK else first
    rest, variance, sums = 0.0, 0.0, Sums(np.nan, np.nan)
    is_done = False
    if span.cols >= BLOCK and (mode == ONE_SWEEP or mode == DIFF_OF_SQUARES):
        rest, variance, sums = shifted(dy, x, weight, span, shift, g_shift, np.float32, ahead)
        is_done = is_enough(rest, variance, FLOAT32_SUMS)
    # a product that was lost to underflow or overflow does not show in a sum that is neither small nor large
    if not is_done or (dy is not None and not SMALLEST < abs(sums.projected) < LARGEST and not is_zero(dy, span)):
        wide_shift = first if mode == DIFF_OF_SQUARES else shift
        wide_rest, wide_variance, sums = shifted(dy, x, weight, span, wide_shift, g_shift, np.float64, ahead)
        if mode == DIFF_OF_SQUARES_64 and not is_enough(wide_rest, wide_variance, FLOAT64_SUMS_64):
            wide_shift = first
            wide_rest, wide_variance, sums = shifted(dy, x, weight, span, wide_shift, g_shift, np.float64, ahead)
        # the statistics are of x alone, whatever dy is
        if not is_done:
            # in float64 it is enough whatever the shift is, since an element is at most sqrt(cols - 1) standard deviations
            # from the mean (Samuelson 1968)
            shift, rest, variance = wide_shift, wide_rest, wide_variance
    mean, lost = two_sum(shift, 0.0, rest)
    return moments_of(mean, lost, variance, element_of(x)), sums


@inlined
def mean_square(x, span, mode, ahead):
    """As `moments`, about 0."""
    found, _ = mean_square_and_sums(None, x, None, span, 0.0, mode, ahead)
    return found


@inlined
def mean_square_and_sums(dy, x, weight, span, g_shift, mode, ahead):
    """As `moments_and_sums`, about 0, the mean of g being 0 as well; so g has no shift."""
    variance, sums = 0.0, Sums(np.nan, np.nan)
    is_done = False
    if span.cols >= BLOCK and mode == MEAN_SQUARE:
        _, variance, sums = shifted(dy, x, weight, span, None, None, np.float32, ahead)
        is_done = is_enough(0.0, variance, FLOAT32_SUMS)
    if not is_done or (dy is not None and not SMALLEST < abs(sums.projected) < LARGEST and not is_zero(dy, span)):
        _, wide_variance, sums = shifted(dy, x, weight, span, None, None, np.float64, ahead)
        if not is_done:
            variance = wide_variance
    return moments_of(0.0, 0.0, variance, element_of(x)), sums


@inlined
def near_mean(x, span):
    """A shift for float32 sums: the mean of eight elements, which is each of them where they are equal.

    A float64 that the type of elements can hold. It is more than a deviation from the mean in 1 normally distributed row of
    200; the mean of four elements would be in 1 of 22, the first one in 1 of 3.
    """
    element = element_of(x)
    at, cols = span.at, span.cols
    # all over the row, and in no column of an image whose sides are powers of two
    first = element(load_one(x, at)) + element(load_one(x, at + (37 * cols >> 8)))
    second = element(load_one(x, at + (73 * cols >> 8))) + element(load_one(x, at + (110 * cols >> 8)))
    third = element(load_one(x, at + (146 * cols >> 8))) + element(load_one(x, at + (183 * cols >> 8)))
    fourth = element(load_one(x, at + (219 * cols >> 8))) + element(load_one(x, at + (255 * cols >> 8)))
    return np.float64(((first + second) + (third + fourth)) * element(0.125))


@inlined
def is_enough(rest, variance, limits):
    """Whether sums with these limits are enough for a variance, and a mean that is the shift and `rest`; NaN fails it."""
    return every(are_enough(rest, variance, limits))


@inlined
def are_enough(rest, variance, limits):
    """The same, of lanes for each of them."""
    condition, smallest, largest = limits
    return (smallest < variance) & (variance < largest) & (rest * rest <= condition * variance)


@inlined
def is_zero(dy, span):
    """Whether all elements are 0, as dy of padding is."""
    zero = element_of(dy)(0)
    count = span.cols & 15
    end = span.at + span.cols - count
    for k in range(span.at, end, 16):
        if not every(load(dy, k) == zero):
            return False
    return every(load_part(dy, end, count, 0.0) == zero)


@inlined
def shifted(dy, x, weight, span, shift, g_shift, sum_type, ahead):
    """The mean less shift, and the variance, from one sweep over d = x - shift (Chan, Golub and LeVeque 1983, eq. 1.4).

    And the sums of g = dy * weight - g_shift in float32; NaN where dy is None. Where the shifts are None, d = x, whose mean
    is taken as 0, and so is the sum of g.
    """
    g_shifts = negative(g_shift)
    weight_at = span.first - span.at
    totals = squares = g_totals = projected = fill(0.0)
    k = span.at
    for _ in range(span.cols // BLOCK):
        block_totals = block_squares = block_g = block_projected = fill(sum_type(0))
        for _ in range(BLOCK // 64):
            for j in range(k, k + 64, 16):
                prefetch(x, j, ahead)
            d0 = less(load(x, k), shift, sum_type)
            d1 = less(load(x, k + 16), shift, sum_type)
            d2 = less(load(x, k + 32), shift, sum_type)
            d3 = less(load(x, k + 48), shift, sum_type)
            # in pairs, which are exact where numbers are equal: one by one, the sums of a row that is mostly one value would
            # be rounded the same way in every block
            block_totals = block_totals + ((d0 + d1) + (d2 + d3))
            block_squares = block_squares + (multiply_add(d1, d1, d0 * d0) + multiply_add(d3, d3, d2 * d2))
            if dy is not None:
                g0 = shifted_g(dy, weight, k, weight_at, g_shifts, sum_type, ahead)
                g1 = shifted_g(dy, weight, k + 16, weight_at, g_shifts, sum_type, ahead)
                g2 = shifted_g(dy, weight, k + 32, weight_at, g_shifts, sum_type, ahead)
                g3 = shifted_g(dy, weight, k + 48, weight_at, g_shifts, sum_type, ahead)
                block_g = block_g + ((g0 + g1) + (g2 + g3))
                block_projected = block_projected + (multiply_add(g1, d1, g0 * d0) + multiply_add(g3, d3, g2 * d2))
            k += 64
        totals = totals + widen(block_totals)
        squares = squares + widen(block_squares)
        g_totals = g_totals + widen(block_g)
        projected = projected + widen(block_projected)
    rest = Span(k, k + weight_at, span.cols % BLOCK)
    rest_totals, rest_squares, rest_sums = sums_over(dy, x, weight, rest, shift, g_shift, sum_type, ahead)
    per_element = 1.0 / np.float64(span.cols)
    squared = total(squares + widen(rest_squares)) * per_element
    if shift is None:
        return 0.0, squared, Sums(0.0, projection(dy, projected + rest_sums.projected))
    mean = total(totals + widen(rest_totals)) * per_element
    variance = at_least_zero(squared - mean * mean)
    if dy is None:
        return mean, variance, Sums(np.nan, np.nan)
    sum_g = total(g_totals + rest_sums.g)
    # the deviations from the mean are d less mean
    return mean, variance, Sums(sum_g, total(projected + rest_sums.projected) - mean * sum_g)


@inlined
def sums_over(dy, x, weight, span, shift, g_shift, sum_type, ahead):
    """The sums, still in lanes, of d, of d², and of g and g * d as in `shifted`; those of g are float64."""
    g_shifts = negative(g_shift)
    weight_at = span.first - span.at
    totals = squares = fill(sum_type(0))
    g_totals = projected = fill(0.0)
    k = span.at
    for _ in range(span.cols >> 4):
        prefetch(x, k, ahead)
        d = less(load(x, k), shift, sum_type)
        totals = totals + d
        squares = multiply_add(d, d, squares)
        if dy is not None:
            g = widen(shifted_g(dy, weight, k, weight_at, g_shifts, sum_type, ahead))
            g_totals = g_totals + g
            projected = multiply_add(g, widen(d), projected)
        k += 16
    count = span.cols & 15
    if count:
        d = less(load_part(x, k, count, 0.0 if shift is None else shift), shift, sum_type)
        totals = totals + d
        squares = multiply_add(d, d, squares)
        if dy is not None:
            parts = multiply_add(load_part(dy, k, count, 0.0), load_part(weight, k + weight_at, count, 0.0), g_shifts)
            g = widen(keep(parts, count))
            g_totals = g_totals + g
            projected = multiply_add(g, widen(d), projected)
    return totals, squares, Sums(g_totals, projected)


@inlined
def less(values, shift, sum_type):
    """The values as that type, less the shift if there is one."""
    return cast(values, sum_type) if shift is None else cast(values, sum_type) - sum_type(shift)


@inlined
def negative(shift):
    """What to add instead of subtracting it, as float32."""
    return None if shift is None else np.float32(-shift)


@inlined
def projection(dy, lanes):
    return np.nan if dy is None else total(lanes)


@inlined
def shifted_g(dy, weight, k, weight_at, g_shift, sum_type, ahead):
    """The g, as in `shifted`, of sixteen elements from k on."""
    prefetch(dy, k, ahead)
    return cast(multiply_add(load(dy, k), load(weight, k + weight_at), g_shift), sum_type)


@inlined
def compensated(x, span, mode, ahead):
    """The moments, in the mode TWO_SWEEPS.

    The mean first, then the deviations from it and their squares, in sums that keep what rounding loses. The mean is found
    from the distances from the first element, which are 0 where all are equal, and exact where all are near.
    """
    at, count = span.at, span.cols & 15
    first = load_one(x, at)
    totals = fill(0.0)
    for k in range(at, at + span.cols - count, 16):
        prefetch(x, k, ahead)
        totals = totals + (widen(load(x, k)) - first)
    end = at + span.cols - count
    if count:
        totals = totals + (widen(load_part(x, end, count, first)) - first)
    per_element = 1.0 / np.float64(span.cols)
    mean = first + total(totals) * per_element

    totals = squares = lost = lost_squares = fill(0.0)
    for k in range(at, end, 16):
        d = widen(load(x, k)) - mean
        totals, lost = two_sum(totals, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
    if count:
        d = widen(load_part(x, end, count, mean)) - mean
        totals, lost = two_sum(totals, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
    # what rounding left of the mean in the deviations
    rest = (total(totals) + total(lost)) * per_element
    variance = (total(squares) + total(lost_squares)) * per_element - rest * rest
    return moments_of(mean, rest, at_least_zero(variance), element_of(x))


@inlined
def compensated_squares(x, span, mode, ahead):
    """The moments, in the mode MEAN_SQUARE_COMPENSATED."""
    at, count = span.at, span.cols & 15
    end = at + span.cols - count
    squares = lost = fill(0.0)
    for k in range(at, end, 16):
        prefetch(x, k, ahead)
        values = widen(load(x, k))
        squares, lost = two_sum(squares, lost, values * values)
    if count:
        values = widen(load_part(x, end, count, 0.0))
        squares, lost = two_sum(squares, lost, values * values)
    variance = (total(squares) + total(lost)) / np.float64(span.cols)
    return moments_of(0.0, 0.0, variance, element_of(x))
