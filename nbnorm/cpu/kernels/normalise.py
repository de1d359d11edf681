"""y of rows whose statistics are known."""

from typing import Any, NamedTuple

from nbnorm.cpu.kernels.row import kept_statistics
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import load, load_part, multiply_add, store, store_part, stream, stream_part


class ForwardOperands(NamedTuple):
    """What a forward reads and writes; None for what is absent. Of x plus a residual, x is the sum, written to total."""

    x: Any
    weight: Any
    bias: Any
    y: Any
    total: Any
    mean: Any
    rstd: Any
    has_statistics: Any
    rows: Any
    cols: Any
    eps: Any


@inlined
def normalise(operands, rows, first, cols, streaming):
    """Write y = (x - mean) * rstd * weight + bias of each of the rows, a tuple of `Placed`, in the same columns."""
    weight, bias = operands.weight, operands.bias
    for c in range(cols >> 4):
        weights = load(weight, first + 16 * c)
        biases = load(bias, first + 16 * c)
        for row in rows:
            put_row(operands, row.at + 16 * c, row.known, weights, biases, streaming)
    count = cols & 15
    if count:
        j = cols - count
        weights = load_part(weight, first + j, count, 0.0)
        biases = load_part(bias, first + j, count, 0.0)
        for row in rows:
            put_part_of_row(operands, row.at + j, count, row.known, weights, biases, streaming)


@inlined
def normalise_rows(operands, rows, kept, streaming):
    """As `normalise`, of short rows whose statistics are kept, column by column."""
    weight, bias, cols = operands.weight, operands.bias, operands.cols
    for c in range(cols >> 4):
        weights = load(weight, 16 * c)
        biases = load(bias, 16 * c)
        for i in range(rows.begin, rows.end):
            k = rows.at + i * rows.pitch + 16 * c
            put_row(operands, k, kept_statistics(kept, i), weights, biases, streaming)
    count = cols & 15
    if count:
        j = cols - count
        weights = load_part(weight, j, count, 0.0)
        biases = load_part(bias, j, count, 0.0)
        for i in range(rows.begin, rows.end):
            k = rows.at + i * rows.pitch + j
            put_part_of_row(operands, k, count, kept_statistics(kept, i), weights, biases, streaming)


@inlined
def put_row(operands, k, statistics, weights, biases, streaming):
    """Write sixteen elements of a row, from element k of x on, and of the total."""
    xs = load(operands.x, k)
    put(operands.total, k, xs, streaming)
    put(operands.y, k, normalised(xs, statistics, weights, biases), streaming)


@inlined
def put_part_of_row(operands, k, count, statistics, weights, biases, streaming):
    """As `put_row`, of `count` elements."""
    xs = load_part(operands.x, k, count, 0.0)
    put_part(operands.total, k, count, xs, streaming)
    put_part(operands.y, k, count, normalised(xs, statistics, weights, biases), streaming)


@inlined
def normalised(xs, statistics, weights, biases):
    """The y of sixteen elements of a row."""
    x_hats = multiply_add(xs - statistics.hi, statistics.rstd, statistics.rest)
    return multiply_add(x_hats, weights, biases)


@inlined
def store_statistics(operands, r, mean, rstd):
    """Write mean and rstd of row r, where they are asked for; no mean where the operands have none."""
    if operands.has_statistics:
        store(operands.mean, r, mean)
        store(operands.rstd, r, rstd)


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
