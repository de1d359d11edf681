"""dx of rows whose statistics are known, and the sums over rows that dweight and dbias are."""

from typing import Any, NamedTuple

import numpy as np

from nbnorm.cpu.kernels.normalise import put, put_part
from nbnorm.cpu.kernels.row import Placed, Span, Sums, kept_row
from nbnorm.cpu.kernels.statistics import BLOCK
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    element_of,
    fill,
    keep,
    load,
    load_one,
    load_part,
    multiply_add,
    prefetch,
    smaller,
    store,
    store_part,
    total,
    until_aligned,
    widen,
)

# rows whose dweight and dbias are summed in registers: as many as fit the first-level cache, at most so many
GROUP_ROWS = 4
GROUP_ELEMENTS = 1 << 14


class BackwardOperands(NamedTuple):
    """What a backward reads and writes; None for what is absent or not asked for. dweight and dbias are sums over rows.

    dtotal is added to dx.
    """

    dy: Any
    dtotal: Any
    x: Any
    weight: Any
    dx: Any
    dweight: Any
    dbias: Any
    mean: Any
    rstd: Any
    cols: Any
    eps: Any


class Results(NamedTuple):
    """Where dweight and dbias are written, and the sums of blocks of rows that they are made of, each of `cols` columns."""

    dweight_sums: Any
    dbias_sums: Any
    dweight: Any
    dbias: Any
    cols: Any


class Columns(NamedTuple):
    """Some columns of a row: which is the first, how many they are, and where its sum is in those over rows."""

    first: Any
    cols: Any
    sums_at: Any


@inlined
def first_gradient(dy, weight, at, element):
    """What dy * weight is in the first column of the row that starts at `at`."""
    g = element(load_one(dy, at))
    if weight is not None:
        g = g * element(load_one(weight, 0))
    return g


@inlined
def gradient_sums(dy, x, weight, span, statistics, shift, ahead, is_given):
    """The sums over a row of g - shift and of (g - shift) * (x - mean), where g = dy * weight, of known statistics.

    With a shift that is near g, a large mean of g costs no digits: the sum of x - mean being 0, the second sum is that of
    g * (x - mean). A given mean may be another than the row's, and takes a shift of 0. The rstd of `statistics` brings
    x - mean near 1, so that no product is lost to underflow.
    """
    totals = projected = fill(0.0)
    blocks = span.cols // BLOCK
    for block in range(blocks):
        j = block * BLOCK
        part = Span(span.at + j, span.first + j, BLOCK)
        sums = gradient_block_sums(dy, x, weight, part, statistics, shift, ahead, is_given)
        totals = totals + widen(sums.g)
        projected = projected + widen(sums.projected)
    j = blocks * BLOCK
    rest = Span(span.at + j, span.first + j, span.cols - j)
    sums = gradient_block_sums(dy, x, weight, rest, statistics, shift, ahead, is_given)
    scale = np.float64(statistics.rstd)
    return Sums(total(totals + widen(sums.g)), total(projected + widen(sums.projected)) / scale)


@inlined
def gradient_block_sums(dy, x, weight, span, statistics, shift, ahead, is_given):
    """The sums, in lanes, of g - shift and of that times (x - mean) * rstd."""
    hi, rest, rstd = statistics
    totals = projected = fill(element_of(x)(0))
    for i in range(span.cols >> 4):
        k = span.at + 16 * i
        prefetch(dy, k, ahead)
        if is_given:
            # which no sweep for the statistics has read
            prefetch(x, k, ahead)
        g = multiply_add(load(dy, k), load(weight, span.first + 16 * i), -shift)
        d = multiply_add(load(x, k) - hi, rstd, rest)
        totals = totals + g
        projected = multiply_add(g, d, projected)
    count = span.cols & 15
    if count:
        j = span.cols - count
        dys = load_part(dy, span.at + j, count, 0.0)
        g = keep(multiply_add(dys, load_part(weight, span.first + j, count, 0.0), -shift), count)
        # the other lanes must not be Inf or NaN, so that they add 0
        d = keep(multiply_add(load_part(x, span.at + j, count, 0.0) - hi, rstd, rest), count)
        totals = totals + g
        projected = multiply_add(g, d, projected)
    return Sums(totals, projected)


@inlined
def gradients(operands, rows, columns, known, following, streaming):
    """As `gradients_of_rows`, of rows that are long enough for dx to begin with what is left of a line."""
    # dx in whole lines, of the first row at least: 1.3x at (4096, 4096), where parts would be streamed alternately, and 1.0
    # to 1.1x in the cache, where reading would wait for what was written to the same place of another page
    head = smaller(columns.cols, until_aligned(operands.dx, rows.at + rows.begin * rows.pitch))
    done = 0
    if rows.end - rows.begin == 4:
        done = (columns.cols - head) >> 4
        gradients_of_four(operands, rows, columns, known, following, streaming, head, done)
    gradients_of_rows(operands, rows, columns, known, following, streaming, head, done)


@inlined
def gradients_of_four(operands, rows, columns, known, following, streaming, head, blocks):
    """As `gradients_of_rows`, of four rows, in columns of sixteen alone."""
    dx, dweight, dbias = operands.dx, operands.dweight, operands.dbias
    # as numbers, not elements of arrays, what is known of four rows stays in registers: 1.1 to 1.4x in bfloat16
    first = placed(rows, known, rows.begin)
    second = placed(rows, known, rows.begin + 1)
    third = placed(rows, known, rows.begin + 2)
    fourth = placed(rows, known, rows.begin + 3)
    for c in range(blocks):
        j = head + 16 * c
        weights = load(operands.weight, columns.first + j)
        dweights = load(dweight, columns.sums_at + j)
        dbiases = load(dbias, columns.sums_at + j)
        k = 64 * c
        for _ in range(4):
            prefetch_inputs(operands, k, following)
            k += 16
        # all is read before the first is written, for the same reason
        dys0, x_hats0, dxs0 = gradients_at(operands, first, j, weights)
        dys1, x_hats1, dxs1 = gradients_at(operands, second, j, weights)
        dys2, x_hats2, dxs2 = gradients_at(operands, third, j, weights)
        dys3, x_hats3, dxs3 = gradients_at(operands, fourth, j, weights)
        put(dx, first.at + j, dxs0, streaming)
        put(dx, second.at + j, dxs1, streaming)
        put(dx, third.at + j, dxs2, streaming)
        put(dx, fourth.at + j, dxs3, streaming)
        dweights, dbiases = with_row(dweights, dbiases, dys0, x_hats0)
        dweights, dbiases = with_row(dweights, dbiases, dys1, x_hats1)
        dweights, dbiases = with_row(dweights, dbiases, dys2, x_hats2)
        dweights, dbiases = with_row(dweights, dbiases, dys3, x_hats3)
        put(dweight, columns.sums_at + j, dweights, False)
        put(dbias, columns.sums_at + j, dbiases, False)


@inlined
def gradients_of_rows(operands, rows, columns, known, following, streaming, head, done):
    """Gradients of some rows, column by column: add to the sums of dweight and dbias, and write dx.

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)). The sums are float64, and grow row after row, so that it is the same
    which rows are taken together. About as many elements as these rows have are prefetched, from `following` on, unless that
    is None. Columns of sixteen begin after `head` others, and `done` of them are.
    """
    dx, dweight, dbias = operands.dx, operands.dweight, operands.dbias
    for c in range(done, (columns.cols - head) >> 4):
        j = head + 16 * c
        weights = load(operands.weight, columns.first + j)
        dweights = load(dweight, columns.sums_at + j)
        dbiases = load(dbias, columns.sums_at + j)
        k = (rows.end - rows.begin) * 16 * c
        for i in range(rows.begin, rows.end):
            prefetch_inputs(operands, k, following)
            k += 16
            row = placed(rows, known, i)
            dys, x_hats, dxs = gradients_at(operands, row, j, weights)
            dweights, dbiases = with_row(dweights, dbiases, dys, x_hats)
            put(dx, row.at + j, dxs, streaming)
        put(dweight, columns.sums_at + j, dweights, False)
        put(dbias, columns.sums_at + j, dbiases, False)
    rest = (columns.cols - head) & 15
    for j, count in ((0, head), (columns.cols - rest, rest)):
        if count > 0:
            gradients_of_part(operands, rows, columns, known, j, count, streaming)


@inlined
def gradients_of_part(operands, rows, columns, known, j, count, streaming):
    """The `count` < 16 columns from j on."""
    dweight, dbias = operands.dweight, operands.dbias
    weights = load_part(operands.weight, columns.first + j, count, 0.0)
    dweights = load_part(dweight, columns.sums_at + j, count, 0.0)
    dbiases = load_part(dbias, columns.sums_at + j, count, 0.0)
    for i in range(rows.begin, rows.end):
        row = placed(rows, known, i)
        dys = load_part(operands.dy, row.at + j, count, 0.0)
        xs = load_part(operands.x, row.at + j, count, 0.0)
        x_hats, dxs = row_gradients(dys, xs, row.known, weights)
        dweights, dbiases = with_row(dweights, dbiases, dys, x_hats)
        dtotals = load_part(operands.dtotal, row.at + j, count, 0.0)
        put_part(operands.dx, row.at + j, count, multiply_add(dxs, None, dtotals), streaming)
    put_part(dweight, columns.sums_at + j, count, dweights, False)
    put_part(dbias, columns.sums_at + j, count, dbiases, False)


@inlined
def placed(rows, known, i):
    """Where row i starts, and what is known of it."""
    return Placed(rows.at + i * rows.pitch, kept_row(known, i))


@inlined
def gradients_at(operands, row, j, weights):
    """dy, x_hat and dx of sixteen elements of a row, from its column j on."""
    dys = load(operands.dy, row.at + j)
    x_hats, dxs = row_gradients(dys, load(operands.x, row.at + j), row.known, weights)
    return dys, x_hats, multiply_add(dxs, None, load(operands.dtotal, row.at + j))


@inlined
def row_gradients(dys, xs, known, weights):
    """x_hat and dx of sixteen elements of a row."""
    statistics, means = known
    x_hats = multiply_add(xs - statistics.hi, statistics.rstd, statistics.rest)
    deviations = multiply_add(multiply_add(dys, weights, -means.hi), statistics.rstd, means.rest)
    return x_hats, multiply_add(x_hats, means.slope, deviations)


@inlined
def prefetch_inputs(operands, k, following):
    """Prefetch dy, and x where the gradients that are asked for need it."""
    prefetch(operands.dy, k, following)
    prefetch(operands.dtotal, k, following)
    prefetch_x(operands.x, operands.dx, operands.dweight, k, following)


@inlined
def prefetch_x(x, dx, dweight, k, following):
    if dx is not None or dweight is not None:
        prefetch(x, k, following)


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
def with_sums(operands, dweight, dbias):
    """The operands with other sums."""
    return BackwardOperands(
        operands.dy, operands.dtotal, operands.x, operands.weight, operands.dx, dweight, dbias, operands.mean, operands.rstd,
        operands.cols, operands.eps,
    )  # fmt: skip


@inlined
def clear(operands, columns):
    """Begin the sums of some columns."""
    clear_one(operands.dweight, columns.sums_at, columns.cols)
    clear_one(operands.dbias, columns.sums_at, columns.cols)


@inlined
def clear_one(sums, at, cols):
    if sums is not None:
        for j in range(at, at + cols):
            store(sums, j, 0.0)


@inlined
def add_blocks(results, blocks, j):
    """Write up to sixteen columns of dweight and dbias, from j on, of the sums of so many blocks, in their order."""
    cols = results.cols
    store_total(results.dweight_sums, j, blocks, cols, False, results.dweight, j, cols - j)
    store_total(results.dbias_sums, j, blocks, cols, False, results.dbias, j, cols - j)


@inlined
def store_total(sums, at, blocks, pitch, streaming, result, j, width):
    """Write up to sixteen columns of the result, from j on: the sum over the blocks, `pitch` apart, rounded once.

    Nothing where sums is None.
    """
    if sums is None:
        return
    totals = fill(0.0)
    if width >= 16:
        for b in range(blocks):
            totals = totals + load(sums, at + b * pitch)
        put(result, j, totals, streaming)
    else:
        for b in range(blocks):
            totals = totals + load_part(sums, at + b * pitch, width, 0.0)
        store_part(result, j, width, totals)
