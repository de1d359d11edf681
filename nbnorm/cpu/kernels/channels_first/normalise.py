"""y of the rows of a block whose statistics are known."""

from nbnorm.cpu.kernels.channels_first.blocks import load_some
from nbnorm.cpu.kernels.normalise import ForwardOperands, normalised, put, put_part, store_statistics
from nbnorm.cpu.kernels.rescaled import row_rescaled
from nbnorm.cpu.kernels.row import Statistics, is_ordinary
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import COUNT, column, element_of, load, number, scratch, smaller, store


@inlined
def normalise_part(operands, layout, block, part, rows, xs, statistics, streaming):
    """Write y of ordinary rows, from one of a block to another, in the channels that the buffer has."""
    begin, end = rows
    count = (end - begin) & 15
    for i in range(part.count):
        weight, bias = number(operands.weight, part.first + i), number(operands.bias, part.first + i)
        k = block.at + (part.first + i) * layout.pitch
        at = i * layout.width
        for j in range(begin, end - count, 16):
            values = load(xs, at + j)
            put(operands.total, k + j, values, streaming)
            put(operands.y, k + j, normalised(values, sixteen_of(statistics, j), weight, bias), streaming)
        if count:
            j = end - count
            values = load(xs, at + j)
            put_part(operands.total, k + j, count, values, streaming)
            put_part(operands.y, k + j, count, normalised(values, sixteen_of(statistics, j), weight, bias), streaming)


@inlined
def sixteen_of(statistics, j):
    return Statistics(load(statistics.hi, j), load(statistics.rest, j), load(statistics.rstd, j))


@inlined
def normalise_mixed(operands, layout, block, j, bounds, has_mean, sums, statistics):
    """Write y of sixteen rows from j on, of which some need another arithmetic: those one by one, then the others."""
    cols, pitch = layout.cols, layout.pitch
    count = smaller(16, block.count - j)
    for i in range(count):
        if not is_ordinary(sums.variances[j + i], operands.eps, bounds):
            at = block.at + j + i
            row = ForwardOperands(
                column(operands.x, at, pitch), operands.weight, operands.bias, column(operands.y, at, pitch),
                column(operands.total, at, pitch), operands.mean, operands.rstd, operands.has_statistics, 1, cols,
                operands.eps,
            )  # fmt: skip
            row_mean, row_rstd = row_rescaled(row, 0, has_mean)
            store_statistics(operands, block.first + j + i, row_mean, row_rstd)

    totals, ys = scratch(COUNT, element_of(statistics.rstd)), scratch(COUNT, element_of(statistics.rstd))
    known = sixteen_of(statistics, j)
    for c in range(cols):
        k = block.at + c * pitch + j
        values = load_some(operands.x, k, count)
        store(totals, 0, values)
        store(ys, 0, normalised(values, known, number(operands.weight, c), number(operands.bias, c)))
        for i in range(count):
            if is_ordinary(sums.variances[j + i], operands.eps, bounds):
                store(operands.total, k + i, totals[i])
                store(operands.y, k + i, ys[i])
