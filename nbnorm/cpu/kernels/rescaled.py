"""The arithmetic of rows whose squares leave the range of the type that a kernel computes in, and of rows with NaN or Inf.

They are rare: everything goes element by element, in float64, which compiles in a fraction of the time that lanes take.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from nbnorm.cpu.kernels.gradients import first_gradient
from nbnorm.cpu.kernels.row import Span, two_sum
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import larger, load_one, smaller, store

# deviations: where sqrt(eps) is more than so many, the variance is lost beside eps, whose own square may be beyond float64
EPS_ALONE = 2.0**40


class Rescaled(NamedTuple):
    """A power of two; the mean, in two parts, and rstd of the row times that; mean and rstd of the row as it is."""

    factor: Any
    hi: Any
    lo: Any
    scaled_rstd: Any
    mean: Any
    rstd: Any


class RescaledMeans(NamedTuple):
    """The means of g, in two parts, and of g * x_hat."""

    hi: Any
    lo: Any
    projected: Any


# numbers that are kept of a row: both
OF_ROW = len(Rescaled._fields)
KEPT = OF_ROW + len(RescaledMeans._fields)
# the factor of a row that needs no rescaling
NOT_RESCALED = 0.0


@inlined
def rescaled(x, at, cols, eps, has_mean):
    """A row whose squares leave the range of its type; the factor brings its largest element near 1."""
    # what a row without deviations has everywhere
    first = load_one(x, at) if has_mean else 0.0
    # -0.0 is no other eps than 0.0
    root_eps = np.sqrt(abs(eps))
    is_constant = True
    largest = plain_mean = 0.0
    for k in range(at, at + cols):
        value = load_one(x, k)
        largest = larger(largest, abs(value))
        is_constant = is_constant and value == first
        plain_mean += (value if has_mean else abs(value)) / cols
    # within what a float64 holds, so that the product is exact
    exponent = smaller(larger(math.frexp(largest)[1], -1000), 1000)
    factor = math.ldexp(1.0, -exponent)
    total = lost = 0.0
    for k in range(at, at + cols):
        # from the first element, as in `compensated`
        total, lost = two_sum(total, lost, load_one(x, k) * factor - first * factor)
    is_finite = abs(total) < np.inf
    if not is_finite:
        if not has_mean:
            # 0 of a row with Inf, as the formula has it
            return Rescaled(factor, 0.0, 0.0, 1.0 / plain_mean, 0.0, 1.0 / plain_mean)
        # of a row with Inf the mean is Inf, although what rounding lost, and the deviations, are NaN
        return Rescaled(factor, np.nan, np.nan, np.nan, plain_mean, np.nan)
    if is_constant:
        # eps may vanish beside the row's scale, and 0 / 0 is not what the formula says
        return Rescaled(factor, first * factor, 0.0, 0.0 if eps > 0.0 else np.inf, first, 1.0 / root_eps)
    mean = first * factor + (total + lost) / cols if has_mean else 0.0
    rest = lost = squares = lost_squares = 0.0
    for k in range(at, at + cols):
        d = load_one(x, k) * factor - mean
        rest, lost = two_sum(rest, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
    rest = (rest + lost) / cols if has_mean else 0.0
    if root_eps * factor > EPS_ALONE:
        return Rescaled(factor, mean, rest, 1.0 / root_eps / factor, (mean + rest) / factor, 1.0 / root_eps)
    variance = larger((squares + lost_squares) / cols - rest * rest, 0.0)
    rstd = 1.0 / np.sqrt(variance + (root_eps * factor) * (root_eps * factor))
    return Rescaled(factor, mean, rest, rstd, (mean + rest) / factor, rstd * factor)


@inlined
def store_rescaled(kept, r, row):
    """Keep what is known of row r."""
    factor, hi, lo, scaled_rstd, mean, rstd = row
    at = r * KEPT
    store(kept, at, factor)
    store(kept, at + 1, hi)
    store(kept, at + 2, lo)
    store(kept, at + 3, scaled_rstd)
    store(kept, at + 4, mean)
    store(kept, at + 5, rstd)


@inlined
def kept_rescaled(kept, r):
    at = r * KEPT
    return Rescaled(kept[at], kept[at + 1], kept[at + 2], kept[at + 3], kept[at + 4], kept[at + 5])


@inlined
def store_rescaled_means(kept, r, means):
    at = r * KEPT + OF_ROW
    store(kept, at, means.hi)
    store(kept, at + 1, means.lo)
    store(kept, at + 2, means.projected)


@inlined
def kept_rescaled_means(kept, r):
    at = r * KEPT + OF_ROW
    return RescaledMeans(kept[at], kept[at + 1], kept[at + 2])


@inlined
def normalise_rescaled(operands, span, row):
    """As `normalise`, for a row that is `rescaled`."""
    for j in range(span.cols):
        x = load_one(operands.x, span.at + j)
        store(operands.total, span.at + j, x)
        value = (x * row.factor - row.hi - row.lo) * row.scaled_rstd
        store(operands.y, span.at + j, scaled_and_shifted(value, operands.weight, operands.bias, span.first + j))


@inlined
def scaled_and_shifted(x_hat, weight, bias, j):
    y = x_hat
    if weight is not None:
        y *= load_one(weight, j)
    if bias is not None:
        y += load_one(bias, j)
    return y


@inlined
def with_weight(dy, weight, j):
    return dy if weight is None else dy * load_one(weight, j)


@inlined
def means_rescaled(operands, at, row, has_mean):
    """The means of a row that is `rescaled`."""
    shift = first_gradient(operands.dy, operands.weight, at, np.float64) if has_mean else 0.0
    cols = operands.cols
    mean_g = mean_gx = mean_x_hat = 0.0
    for j in range(cols):
        g = with_weight(load_one(operands.dy, at + j), operands.weight, j)
        x_hat = (load_one(operands.x, at + j) * row.factor - row.hi - row.lo) * row.scaled_rstd
        mean_g += (g - shift) / cols
        mean_gx += (g - shift) * x_hat / cols
        mean_x_hat += x_hat / cols
    if not has_mean:
        return RescaledMeans(0.0, 0.0, mean_gx)
    g_hi, g_lo = two_sum(shift, 0.0, mean_g)
    # the last is 0 but for rounding
    return RescaledMeans(g_hi, g_lo, mean_gx - mean_g * mean_x_hat)


@inlined
def gradients_rescaled(operands, at, columns, row, means):
    """As `gradients`, for one row that is `rescaled`."""
    for j in range(columns.cols):
        dy = load_one(operands.dy, at + j)
        x_hat = (load_one(operands.x, at + j) * row.factor - row.hi - row.lo) * row.scaled_rstd
        add_one(operands.dweight, columns.sums_at + j, dy * x_hat)
        add_one(operands.dbias, columns.sums_at + j, dy)
        g = with_weight(dy, operands.weight, columns.first + j) - means.hi - means.lo - x_hat * means.projected
        put_one(operands.dx, operands.dtotal, at + j, g, row)


@inlined
def add_one(sums, k, value):
    if sums is not None:
        store(sums, k, sums[k] + value)


@inlined
def put_one(dx, dtotal, k, g, row):
    if dx is not None:
        # where rstd is beyond float64, dx need not be
        value = g * row.rstd if row.rstd < np.inf else g * row.scaled_rstd * row.factor
        store(dx, k, with_total(value, dtotal, k))


@inlined
def with_total(value, dtotal, k):
    return value if dtotal is None else value + load_one(dtotal, k)


@inlined
def row_rescaled(operands, at, has_mean):
    """Statistics and y of a whole row: writes y, and returns the mean and rstd of the row as it is."""
    row = rescaled(operands.x, at, operands.cols, operands.eps, has_mean)
    normalise_rescaled(operands, Span(at, at - at, operands.cols), row)
    return row.mean, row.rstd


@inlined
def row_gradients_rescaled(operands, at, columns, has_mean):
    """Statistics, means and gradients of a whole row."""
    row = rescaled(operands.x, at, operands.cols, operands.eps, has_mean)
    gradients_rescaled(operands, at, columns, row, means_rescaled(operands, at, row, has_mean))
