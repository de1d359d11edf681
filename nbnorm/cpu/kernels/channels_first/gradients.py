"""dx of the rows of a block whose statistics are known, and their share of dweight and dbias."""

from nbnorm.cpu.kernels.channels_first.blocks import are_ordinary, load_some
from nbnorm.cpu.kernels.channels_first.normalise import sixteen_of
from nbnorm.cpu.kernels.gradients import BackwardOperands, row_gradients, with_row
from nbnorm.cpu.kernels.normalise import put, put_part
from nbnorm.cpu.kernels.rescaled import row_gradients_rescaled
from nbnorm.cpu.kernels.row import Known, Means, is_ordinary
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    COUNT,
    choose,
    column,
    element_of,
    fill,
    fill_for,
    keep,
    load,
    multiply_add,
    number,
    scratch,
    smaller,
    store,
    total,
)


@inlined
def gradients_of_part(operands, layout, block, part, rows, buffers, known, columns, streaming):
    """Write dx of ordinary rows, of the channels in the buffers, and add to the sums."""
    begin, end = rows
    xs, dys = buffers
    count = (end - begin) & 15
    for i in range(part.count):
        c = part.first + i
        k = block.at + c * layout.pitch
        weight = number(operands.weight, c)
        dweights, dbiases = fill_for(operands.dweight, 0.0), fill_for(operands.dbias, 0.0)
        for j in range(begin, end - count, 16):
            values = load(dys, i * layout.width + j)
            x_hats, dxs = row_gradients(values, load(xs, i * layout.width + j), known_of(known, j), weight)
            dweights, dbiases = with_row(dweights, dbiases, values, x_hats)
            put(operands.dx, k + j, multiply_add(dxs, None, load_some(operands.dtotal, k + j, 16)), streaming)
        if count:
            j = end - count
            values = keep(load(dys, i * layout.width + j), count)
            x_hats, dxs = row_gradients(values, load(xs, i * layout.width + j), known_of(known, j), weight)
            dweights, dbiases = with_row(dweights, dbiases, values, keep(x_hats, count))
            dtotals = load_some(operands.dtotal, k + j, count)
            put_part(operands.dx, k + j, count, multiply_add(dxs, None, dtotals), streaming)
        add_sum(operands.dweight, columns.sums_at + c, dweights)
        add_sum(operands.dbias, columns.sums_at + c, dbiases)


@inlined
def known_of(known, j):
    means = known.means
    return Known(sixteen_of(known.statistics, j), Means(load(means.hi, j), load(means.rest, j), load(means.slope, j)))


@inlined
def add_sum(sums, k, lanes):
    if sums is not None:
        store(sums, k, sums[k] + total(lanes))


@inlined
def gradients_of_mixed(operands, layout, block, j, bounds, has_mean, kept, columns):
    """As `gradients_of_part`, of sixteen rows from j on, of which some need another arithmetic: those first, one by one."""
    sums, known = kept
    cols, pitch = layout.cols, layout.pitch
    count = smaller(16, block.count - j)
    for i in range(count):
        if not is_ordinary(sums.variances[j + i], operands.eps, bounds):
            at = block.at + j + i
            row = BackwardOperands(
                column(operands.dy, at, pitch), column(operands.dtotal, at, pitch), column(operands.x, at, pitch),
                operands.weight, column(operands.dx, at, pitch), operands.dweight, operands.dbias, operands.mean,
                operands.rstd, cols, operands.eps,
            )  # fmt: skip
            row_gradients_rescaled(row, 0, columns, has_mean)

    room = scratch(COUNT, element_of(known.statistics.rstd))
    row_known = known_of(known, j)
    ordinary = are_ordinary(load(sums.variances, j), operands.eps, bounds)
    zeros = fill(element_of(known.statistics.rstd)(0))
    for c in range(cols):
        k = block.at + c * pitch + j
        dys = load_some(operands.dy, k, count)
        x_hats, dxs = row_gradients(dys, load_some(operands.x, k, count), row_known, number(operands.weight, c))
        dweights, dbiases = with_row(
            fill_for(operands.dweight, 0.0), fill_for(operands.dbias, 0.0),
            keep(choose(ordinary, dys, zeros), count), keep(choose(ordinary, x_hats, zeros), count),
        )  # fmt: skip
        add_sum(operands.dweight, columns.sums_at + c, dweights)
        add_sum(operands.dbias, columns.sums_at + c, dbiases)
        if operands.dx is not None:
            store(room, 0, multiply_add(dxs, None, load_some(operands.dtotal, k, count)))
            for i in range(count):
                if is_ordinary(sums.variances[j + i], operands.eps, bounds):
                    store(operands.dx, k + i, room[i])
