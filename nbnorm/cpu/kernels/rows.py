"""The arithmetic of one row, or of a segment of a long one, as jitted functions that the kernels share.

`at` is where the row starts in the flat array x, `cols` its length. Arithmetic on elements is in the type `element`, the
widest of all operands; sums are float64, but for those of a few elements. A mean is kept in two parts, `hi` of that type and
the small rest `lo`, so that `(x - hi) * rstd - lo * rstd` loses no digits where the mean is large against the deviations: a
float32 mean alone costs 1e-3 at mean/std = 1e4.

These functions are inlined into every kernel that calls them. What is behind a branch on `mode` is compiled, and then left
out; behind a branch on it in a kernel, or on `is None`, it is not compiled at all. A name has one type, and an argument that
may be None is not assigned to, as `steps` says. For `in`, `**`, `min` and `max` Numba compiles functions of its own, which
take as long as these.
"""

import numpy as np

from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    cast,
    fill,
    keep,
    larger,
    load,
    load_one,
    load_part,
    multiply_add,
    prefetch,
    smaller,
    store,
    store_part,
    stream,
    stream_part,
    total,
    until_aligned,
    widen,
)

# what `merged` knows of each segment of a row: PARTS numbers
HI, LO, VARIANCE, SUM_G, PROJECTED, PARTS = range(6)

# how the variance is found: from the deviations from a number in the row's range, in one sweep; from those from the mean,
# with compensated sums, for float64 rows; or as mean(x²) - mean(x)², where that has digits. Where results are float64 (_64),
# so are all sums
ONE_SWEEP, ONE_SWEEP_64, TWO_SWEEPS, DIFF_OF_SQUARES, DIFF_OF_SQUARES_64 = range(5)

# a float32 sum of products is enough where it is far from overflow and underflow
SMALLEST, LARGEST = 2.0**-80, 2.0**80
# sums are enough for a variance that is between two numbers, and that the square of the mean's distance from the shift is at
# most so many times of: float32 sums for float32's digits, float64 sums for these, and for there to be any of float64's
FLOAT32_SUMS = 1.0, SMALLEST, LARGEST
FLOAT64_SUMS = 2.0**28, 0.0, np.inf
FLOAT64_SUMS_64 = 2.0**42, 0.0, np.inf
# elements whose float32 sums are taken before float64 goes on; rows of fewer have float64 sums alone
BLOCK = 128


@inlined
def statistics(x, at, cols, element, mode, ahead):
    """hi, lo and variance; prefetches the element that is `ahead` of each that it reads, unless that is None.

    Of any mode but TWO_SWEEPS, which has `compensated`.
    """
    hi, lo, variance, _ = statistics_and_sums(None, x, at, cols, 0.0, None, 0, element, mode, ahead)
    return hi, lo, variance


@inlined
def statistics_and_sums(dy, x, at, cols, g_shift, weight, to_weight, element, mode, ahead):
    """As `statistics`, and in the same sweeps the sums that `gradient_sums` finds; NaN where dy is None.

    dy is for rows whose `element` is float32; element k of it belongs to element k + `to_weight` of weight.
    """
    is_diff_of_squares = mode == DIFF_OF_SQUARES or mode == DIFF_OF_SQUARES_64
    shift = 0.0
    if not is_diff_of_squares:
        shift = near_mean(x, at, cols, element) if cols >= BLOCK else load_one(x, at)
    rest, variance, sums = 0.0, 0.0, (np.nan, np.nan)
    is_done = False
    if cols >= BLOCK and (mode == ONE_SWEEP or mode == DIFF_OF_SQUARES):
        rest, variance, sums = shifted(dy, x, at, cols, shift, g_shift, weight, to_weight, np.float32, ahead)
        is_done = is_enough(rest, variance, FLOAT32_SUMS)
    # a product that was lost to underflow or overflow does not show in a sum that is neither small nor large
    if not is_done or (dy is not None and not SMALLEST < abs(sums[1]) < LARGEST and not is_zero(dy, at, cols)):
        wide_shift = load_one(x, at) if mode == DIFF_OF_SQUARES else shift
        rest_64, variance_64, sums = shifted(dy, x, at, cols, wide_shift, g_shift, weight, to_weight, np.float64, ahead)
        if mode == DIFF_OF_SQUARES_64 and not is_enough(rest_64, variance_64, FLOAT64_SUMS_64):
            wide_shift = load_one(x, at)
            rest_64, variance_64, sums = shifted(dy, x, at, cols, wide_shift, g_shift, weight, to_weight, np.float64, ahead)
        # the statistics are of x alone, whatever dy is
        if not is_done:
            # in float64 it is enough whatever the shift is, since an element is at most sqrt(cols - 1) standard deviations
            # from the mean (Samuelson 1968)
            shift, rest, variance = wide_shift, rest_64, variance_64
    mean, lost = two_sum(shift, 0.0, rest)
    hi, lo = split(mean, lost, element)
    return hi, lo, variance, sums


@inlined
def near_mean(x, at, cols, element):
    """A shift for float32 sums: the mean of eight elements, which is each of them where they are equal.

    A float64 that `element` can hold. It is more than a deviation from the mean in 1 normally distributed row of 200; the
    mean of four elements would be in 1 of 22, the first one in 1 of 3.
    """
    # all over the row, and in no column of an image whose sides are powers of two
    first = element(load_one(x, at)) + element(load_one(x, at + (37 * cols >> 8)))
    second = element(load_one(x, at + (73 * cols >> 8))) + element(load_one(x, at + (110 * cols >> 8)))
    third = element(load_one(x, at + (146 * cols >> 8))) + element(load_one(x, at + (183 * cols >> 8)))
    fourth = element(load_one(x, at + (219 * cols >> 8))) + element(load_one(x, at + (255 * cols >> 8)))
    return np.float64(((first + second) + (third + fourth)) * element(0.125))


@inlined
def is_enough(rest, variance, limits):
    """Whether sums with these limits are enough for a variance, and a mean that is the shift and `rest`; NaN fails it."""
    condition, smallest, largest = limits
    return smallest < variance < largest and rest * rest <= condition * variance


@inlined
def is_zero(row, at, cols):
    """Whether all elements are 0, as dy of padding is."""
    others = 0
    for k in range(at, at + cols):
        others += row[k] != 0
    return others == 0


@inlined
def shifted(dy, x, at, cols, shift, g_shift, weight, to_weight, sum_type, ahead):
    """The mean less shift, and the variance, from one sweep over d = x - shift (Chan, Golub and LeVeque 1983, eq. 1.4).

    And the sums of g and of g * (x - mean), where g = dy * weight - g_shift in float32; NaN where dy is None.
    """
    shifts = fill(sum_type(shift))
    minus_shifts = fill(np.float32(-g_shift))
    totals = squares = g_totals = projected = fill(0.0)
    k = at
    for _ in range(cols // BLOCK):
        block_totals = block_squares = block_g = block_projected = fill(sum_type(0))
        for _ in range(BLOCK // 64):
            for j in range(k, k + 64, 16):
                prefetch(x, j, ahead)
            d0 = load(x, k, sum_type) - shifts
            d1 = load(x, k + 16, sum_type) - shifts
            d2 = load(x, k + 32, sum_type) - shifts
            d3 = load(x, k + 48, sum_type) - shifts
            # in pairs, which are exact where numbers are equal: one by one, the sums of a row that is mostly one value would
            # be rounded the same way in every block
            block_totals = block_totals + ((d0 + d1) + (d2 + d3))
            block_squares = block_squares + (multiply_add(d1, d1, d0 * d0) + multiply_add(d3, d3, d2 * d2))
            if dy is not None:
                g0 = shifted_g(dy, k, weight, to_weight, minus_shifts, sum_type, ahead)
                g1 = shifted_g(dy, k + 16, weight, to_weight, minus_shifts, sum_type, ahead)
                g2 = shifted_g(dy, k + 32, weight, to_weight, minus_shifts, sum_type, ahead)
                g3 = shifted_g(dy, k + 48, weight, to_weight, minus_shifts, sum_type, ahead)
                block_g = block_g + ((g0 + g1) + (g2 + g3))
                block_projected = block_projected + (multiply_add(g1, d1, g0 * d0) + multiply_add(g3, d3, g2 * d2))
            k += 64
        totals = totals + widen(block_totals)
        squares = squares + widen(block_squares)
        g_totals = g_totals + widen(block_g)
        projected = projected + widen(block_projected)
    block_totals, block_squares, block_g, block_projected = sums_over(
        dy, x, k, cols % BLOCK, shift, g_shift, weight, to_weight, sum_type, ahead
    )
    per_element = 1.0 / np.float64(cols)
    mean = total(totals + widen(block_totals)) * per_element
    variance = larger(total(squares + widen(block_squares)) * per_element - mean * mean, 0.0)
    if dy is None:
        return mean, variance, (np.nan, np.nan)
    sum_g = total(g_totals + block_g)
    # the deviations from the mean are d less mean
    return mean, variance, (sum_g, total(projected + block_projected) - mean * sum_g)


@inlined
def sums_over(dy, x, k, cols, shift, g_shift, weight, to_weight, sum_type, ahead):
    """The sums, still in lanes, of d, d², g and g * d as in `shifted`, over the elements from k on; g's are float64."""
    shifts = fill(sum_type(shift))
    minus_shifts = fill(np.float32(-g_shift))
    totals = squares = fill(sum_type(0))
    g_totals = projected = fill(0.0)
    for _ in range(cols >> 4):
        prefetch(x, k, ahead)
        d = load(x, k, sum_type) - shifts
        totals = totals + d
        squares = multiply_add(d, d, squares)
        if dy is not None:
            g = shifted_g(dy, k, weight, to_weight, minus_shifts, sum_type, ahead)
            g_totals = g_totals + widen(g)
            projected = multiply_add(widen(g), widen(d), projected)
        k += 16
    count = cols & 15
    if count:
        d = load_part(x, k, count, sum_type, sum_type(shift)) - shifts
        totals = totals + d
        squares = multiply_add(d, d, squares)
        if dy is not None:
            dys = load_part(dy, k, count, np.float32, np.float32(0))
            weights = load_part(weight, k + to_weight, count, np.float32, np.float32(0))
            g = cast(keep(multiply_add(dys, weights, minus_shifts), count), sum_type)
            g_totals = g_totals + widen(g)
            projected = multiply_add(widen(g), widen(d), projected)
    return totals, squares, g_totals, projected


@inlined
def shifted_g(dy, k, weight, to_weight, minus_shifts, sum_type, ahead):
    """The g, as in `shifted`, of sixteen elements from k on."""
    prefetch(dy, k, ahead)
    weights = load(weight, k + to_weight, np.float32)
    return cast(multiply_add(load(dy, k, np.float32), weights, minus_shifts), sum_type)


@inlined
def compensated(x, at, cols, element, ahead):
    """The mean first, then the deviations from it and their squares, in sums that keep what rounding loses.

    The mean is found from the distances from the first element, which are 0 where all are equal, and exact where all are
    near.
    """
    first = load_one(x, at)
    firsts = fill(first)
    totals = fill(0.0)
    k = at
    for _ in range(cols >> 4):
        prefetch(x, k, ahead)
        totals = totals + (load(x, k, np.float64) - firsts)
        k += 16
    if cols & 15:
        totals = totals + (load_part(x, k, cols & 15, np.float64, first) - firsts)
    per_element = 1.0 / np.float64(cols)
    mean = first + total(totals) * per_element

    means = fill(mean)
    totals = squares = lost = lost_squares = fill(0.0)
    k = at
    for _ in range(cols >> 4):
        d = load(x, k, np.float64) - means
        totals, lost = two_sum(totals, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
        k += 16
    if cols & 15:
        d = load_part(x, k, cols & 15, np.float64, mean) - means
        totals, lost = two_sum(totals, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
    # what rounding left of the mean in the deviations
    rest = (total(totals) + total(lost)) * per_element
    variance = (total(squares) + total(lost_squares)) * per_element - rest * rest
    hi, lo = split(mean, rest, element)
    return hi, lo, larger(variance, 0.0)


@inlined
def two_sum(sums, lost, values):
    """The sum of both, and in `lost` what the addition rounded off (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    result = sums + values
    added = result - sums
    return result, lost + ((sums - (result - added)) + (values - added))


@inlined
def split(value, rest, element):
    """The sum of both as one of two numbers of the type `element`."""
    hi = element(value)
    return hi, element((value - np.float64(hi)) + rest)


@inlined
def rest_of(lo, rstd):
    """What is left of the mean: x_hat = (x - hi) * rstd + rest, in two operations an element where lo took three."""
    return -(lo * rstd)


@inlined
def merged(parts, width, cols):
    """hi, lo, variance and gradient sums of a row, from those of its segments, which are `width` wide but for the last.

    Chan, Golub and LeVeque 1983, eq. 2.1, and the same for the sum of g * (x - mean).
    """
    base_hi, base_lo = parts[HI], parts[LO]
    total_distance = 0.0
    for s in range(-(-cols // width)):
        distance = (parts[PARTS * s + HI] - base_hi) + (parts[PARTS * s + LO] - base_lo)
        total_distance += smaller(width, cols - s * width) * distance
    rest = base_lo + total_distance / cols
    hi = base_hi + rest
    lo = (base_hi - (hi - (hi - base_hi))) + (rest - (hi - base_hi))

    squares = totals = projected = 0.0
    for s in range(-(-cols // width)):
        distance = (parts[PARTS * s + HI] - hi) + (parts[PARTS * s + LO] - lo)
        squares += smaller(width, cols - s * width) * (parts[PARTS * s + VARIANCE] + distance * distance)
        totals += parts[PARTS * s + SUM_G]
        projected += parts[PARTS * s + PROJECTED] + parts[PARTS * s + SUM_G] * distance
    return hi, lo, squares / cols, totals, projected


@inlined
def normalise(x, rows, cols, weight, bias, first, element, streaming, y):
    """Write y = (x - mean) * rstd * weight + bias; weight and bias may be None.

    `rows` is a tuple of where a row, or a segment of one, starts, and its hi, rest and rstd; of several such, which are
    elsewhere in the same columns. `first` is the first of these.
    """
    for c in range(cols >> 4):
        weights = load(weight, first + 16 * c, element)
        biases = load(bias, first + 16 * c, element)
        for at, hi, rest, rstd in rows:
            values = normalised(load(x, at + 16 * c, element), hi, rest, rstd, weights, biases)
            put(y, at + 16 * c, values, streaming)
    count = cols & 15
    if count:
        j = cols - count
        weights = load_part(weight, first + j, count, element, element(0))
        biases = load_part(bias, first + j, count, element, element(0))
        for at, hi, rest, rstd in rows:
            values = normalised(load_part(x, at + j, count, element, element(0)), hi, rest, rstd, weights, biases)
            put_part(y, at + j, count, values, streaming)


@inlined
def normalised(xs, hi, rest, rstd, weights, biases):
    """The result, y, of sixteen elements of a row."""
    return multiply_add(multiply_add(xs - fill(hi), fill(rstd), fill(rest)), weights, biases)


@inlined
def first_gradient(dy, at, weight, element):
    """What dy * weight is in the first column of the row that starts at `at`."""
    g = element(load_one(dy, at))
    if weight is not None:
        g = g * element(load_one(weight, 0))
    return g


@inlined
def gradient_sums(dy, x, at, cols, hi, rest, scale, shift, weight, first, element, ahead, is_given):
    """The sums over a row of g - shift and of (g - shift) * (x - mean), where g = dy * weight, of known statistics.

    With a shift that is near g, a large mean of g costs no digits: the sum of x - mean being 0, the second sum is that of
    g * (x - mean). A given mean may be another than the row's, and takes a shift of 0. `scale` brings x - mean near
    1, so that no product is lost to underflow.
    """
    his = fill(hi)
    rests = fill(rest)
    scales = fill(scale)
    minus_shifts = fill(-shift)
    totals = projected = fill(0.0)
    for block in range(cols // BLOCK):
        j = block * BLOCK
        block_totals, block_projected = gradient_block_sums(
            dy, x, at + j, BLOCK, his, rests, scales, minus_shifts, weight, first + j, element, ahead, is_given
        )
        totals = totals + widen(block_totals)
        projected = projected + widen(block_projected)
    j = cols - cols % BLOCK
    block_totals, block_projected = gradient_block_sums(
        dy, x, at + j, cols % BLOCK, his, rests, scales, minus_shifts, weight, first + j, element, ahead, is_given
    )
    return total(totals + widen(block_totals)), total(projected + widen(block_projected)) / np.float64(scale)


@inlined
def gradient_block_sums(dy, x, at, cols, his, rests, scales, minus_shifts, weight, first, element, ahead, is_given):
    """The sums of g - shift and of that times (x - mean) * scale."""
    totals = projected = fill(element(0))
    for i in range(cols >> 4):
        k = at + 16 * i
        prefetch(dy, k, ahead)
        if is_given:
            # which no sweep for the statistics has read
            prefetch(x, k, ahead)
        g = multiply_add(load(dy, k, element), load(weight, first + 16 * i, element), minus_shifts)
        d = multiply_add(load(x, k, element) - his, scales, rests)
        totals = totals + g
        projected = multiply_add(g, d, projected)
    count = cols & 15
    if count:
        j = cols - count
        dys = load_part(dy, at + j, count, element, element(0))
        g = keep(multiply_add(dys, load_part(weight, first + j, count, element, element(0)), minus_shifts), count)
        # the other lanes must not be Inf or NaN, so that they add 0
        d = keep(multiply_add(load_part(x, at + j, count, element, element(0)) - his, scales, rests), count)
        totals = totals + g
        projected = multiply_add(g, d, projected)
    return totals, projected


@inlined
def usable(scale, element):
    """A number to multiply by and to divide by again: the scale where it is one, else 1."""
    return scale if 0 < abs(scale) < np.inf else element(1)


@inlined
def remember(means, i, rstd, shift, sums, cols, element):
    """Keep what `gradients` needs of a row beside its statistics, from its sums of g."""
    g_his, g_rests, slopes = means
    totals, projected = sums
    per_element = 1.0 / np.float64(cols)
    mean_g, lost = two_sum(np.float64(shift), 0.0, totals * per_element)
    g_hi, g_lo = split(mean_g, lost, element)
    g_his[i], g_rests[i] = g_hi, rest_of(g_lo, rstd)
    slopes[i] = -element(projected * per_element * np.float64(rstd)) * rstd


@inlined
def gradients(
    dy, x, at, pitch, begin, end, cols, following, statistics, means, weight, first, element, streaming, dx, dweight, dbias,
    sums_at,
):  # fmt: skip
    """As `gradients_of_rows`, of rows that are long enough for dx to begin with what is left of a line."""
    # dx in whole lines, of the first row at least: 1.3x at (4096, 4096), where parts would be streamed alternately, and 1.0
    # to 1.1x in the cache, where reading would wait for what was written to the same place of another page
    head = smaller(cols, until_aligned(dx, at + begin * pitch))
    done = 0
    if end - begin == 4:
        done = (cols - head) >> 4
        # not `begin`, which may be the literal 0, for which Numba would compile row_of once more
        gradients_of_four(
            dy, x, at, pitch, end - 4, head, done, following, statistics, means, weight, first, element, streaming, dx,
            dweight, dbias, sums_at,
        )  # fmt: skip
    gradients_of_rows(
        dy, x, at, pitch, begin, end, cols, head, done, following, statistics, means, weight, first, element, streaming, dx,
        dweight, dbias, sums_at,
    )  # fmt: skip


@inlined
def gradients_of_four(
    dy, x, at, pitch, begin, head, blocks, following, statistics, means, weight, first, element, streaming, dx, dweight,
    dbias, sums_at,
):  # fmt: skip
    """As `gradients_of_rows`, of the four rows from `begin` on, in columns of sixteen alone."""
    # as numbers, not elements of arrays, what is known of four rows stays in registers: 1.1 to 1.4x in bfloat16
    rows = (
        row_of(at, pitch, statistics, means, begin),
        row_of(at, pitch, statistics, means, begin + 1),
        row_of(at, pitch, statistics, means, begin + 2),
        row_of(at, pitch, statistics, means, begin + 3),
    )
    for c in range(blocks):
        j = head + 16 * c
        weights = load(weight, first + j, element)
        dweights = load(dweight, sums_at + j, np.float64)
        dbiases = load(dbias, sums_at + j, np.float64)
        k = 64 * c
        for _ in range(4):
            prefetch_both(dy, x, k, following, dx, dweight)
            k += 16
        # all is read before the first is written, for the same reason
        dys0, x_hats0, dxs0 = gradients_at(dy, x, rows[0], j, weights, element)
        dys1, x_hats1, dxs1 = gradients_at(dy, x, rows[1], j, weights, element)
        dys2, x_hats2, dxs2 = gradients_at(dy, x, rows[2], j, weights, element)
        dys3, x_hats3, dxs3 = gradients_at(dy, x, rows[3], j, weights, element)
        put(dx, rows[0][0] + j, dxs0, streaming)
        put(dx, rows[1][0] + j, dxs1, streaming)
        put(dx, rows[2][0] + j, dxs2, streaming)
        put(dx, rows[3][0] + j, dxs3, streaming)
        dweights, dbiases = with_row(dweights, dbiases, dys0, x_hats0)
        dweights, dbiases = with_row(dweights, dbiases, dys1, x_hats1)
        dweights, dbiases = with_row(dweights, dbiases, dys2, x_hats2)
        dweights, dbiases = with_row(dweights, dbiases, dys3, x_hats3)
        put(dweight, sums_at + j, dweights, False)
        put(dbias, sums_at + j, dbiases, False)


@inlined
def gradients_of_rows(
    dy, x, at, pitch, begin, end, cols, head, done, following, statistics, means, weight, first, element, streaming, dx,
    dweight, dbias, sums_at,
):  # fmt: skip
    """Gradients of some rows, column by column: add to the sums of dweight and dbias, and write dx.

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)). The rows are those from `begin` to `end` of some that start at `at`
    and are `pitch` apart; `statistics` has their hi, rest and rstd, and `means` what `remember` wrote of them. The sums are
    float64, that of a segment's first column at `sums_at`, and grow row after row, so that it is the same which rows are
    taken together. About as many elements as these rows have are prefetched, from `following` on, unless that is None.
    Columns of sixteen begin after `head` others, and `done` of them are.
    """
    blocks = (cols - head) >> 4
    for c in range(done, blocks):
        j = head + 16 * c
        weights = load(weight, first + j, element)
        dweights = load(dweight, sums_at + j, np.float64)
        dbiases = load(dbias, sums_at + j, np.float64)
        k = (end - begin) * 16 * c
        for i in range(begin, end):
            prefetch_both(dy, x, k, following, dx, dweight)
            k += 16
            row = row_of(at, pitch, statistics, means, i)
            dys, x_hats, dxs = gradients_at(dy, x, row, j, weights, element)
            dweights, dbiases = with_row(dweights, dbiases, dys, x_hats)
            put(dx, row[0] + j, dxs, streaming)
        put(dweight, sums_at + j, dweights, False)
        put(dbias, sums_at + j, dbiases, False)
    rest = (cols - head) & 15
    for j, count in ((0, head), (cols - rest, rest)):
        if count == 0:
            continue
        weights = load_part(weight, first + j, count, element, element(0))
        dweights = load_part(dweight, sums_at + j, count, np.float64, 0.0)
        dbiases = load_part(dbias, sums_at + j, count, np.float64, 0.0)
        for i in range(begin, end):
            row_at, known = row_of(at, pitch, statistics, means, i)
            dys = load_part(dy, row_at + j, count, element, element(0))
            xs = load_part(x, row_at + j, count, element, element(0))
            x_hats, dxs = row_gradients(dys, xs, known, weights)
            dweights, dbiases = with_row(dweights, dbiases, dys, x_hats)
            put_part(dx, row_at + j, count, dxs, streaming)
        put_part(dweight, sums_at + j, count, dweights, False)
        put_part(dbias, sums_at + j, count, dbiases, False)


@inlined
def gradients_at(dy, x, row, j, weights, element):
    """dy, x_hat and dx of sixteen elements of a row, from its column j on."""
    row_at, known = row
    dys = load(dy, row_at + j, element)
    x_hats, dxs = row_gradients(dys, load(x, row_at + j, element), known, weights)
    return dys, x_hats, dxs


@inlined
def prefetch_both(dy, x, k, following, dx, dweight):
    """Prefetch dy, and x where the gradients that are asked for need it."""
    prefetch(dy, k, following)
    if dx is not None or dweight is not None:
        prefetch(x, k, following)


@inlined
def clear(sums, at, cols):
    """Begin the sums of some columns; nothing where sums is None."""
    if sums is not None:
        for j in range(at, at + cols):
            sums[j] = 0.0


@inlined
def row_of(at, pitch, statistics, means, i):
    """Where row i starts, and all that its gradients need to know of it."""
    his, rests, rstds = statistics
    g_his, g_rests, slopes = means
    return at + i * pitch, (his[i], rests[i], rstds[i], g_his[i], g_rests[i], slopes[i])


@inlined
def row_gradients(dys, xs, row, weights):
    """x_hat and dx of sixteen elements of a row."""
    hi, rest, rstd, g_hi, g_rest, slope = row
    x_hats = multiply_add(xs - fill(hi), fill(rstd), fill(rest))
    deviations = multiply_add(multiply_add(dys, weights, fill(-g_hi)), fill(rstd), fill(g_rest))
    return x_hats, multiply_add(x_hats, fill(slope), deviations)


@inlined
def with_row(dweights, dbiases, dys, x_hats):
    """The sums of dweight and dbias with sixteen elements of another row in them; None of None."""
    new_dweights, new_dbiases = dweights, dbiases
    if dweights is not None:
        new_dweights = multiply_add(widen(dys), widen(x_hats), dweights)
    if dbiases is not None:
        new_dbiases = dbiases + widen(dys)
    return new_dweights, new_dbiases


@inlined
def put(destination, k, values, streaming):
    """Write sixteen elements, by way of the caches or past them; nothing where the destination is None."""
    if destination is not None:
        if streaming:
            stream(destination, k, values)
        else:
            store(destination, k, values)


@inlined
def put_part(destination, k, count, values, streaming):
    """As `put`, of `count` elements."""
    if destination is not None:
        if streaming:
            stream_part(destination, k, count, values)
        else:
            store_part(destination, k, count, values)


@inlined
def add_blocks(sums, at, blocks, pitch, streaming, result, j, width):
    """Write up to sixteen columns of the result, from j on: the sum over the blocks, `pitch` apart, rounded once.

    Nothing where sums is None.
    """
    if sums is None:
        return
    totals = fill(0.0)
    if width >= 16:
        for b in range(blocks):
            totals = totals + load(sums, at + b * pitch, np.float64)
        put(result, j, totals, streaming)
    else:
        for b in range(blocks):
            totals = totals + load_part(sums, at + b * pitch, width, np.float64, 0.0)
        store_part(result, j, width, totals)
