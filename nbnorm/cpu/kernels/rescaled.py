"""The arithmetic of rows whose squares leave the range of the type that a kernel computes in, and of rows with NaN or Inf.

They are rare: everything goes element by element, in float64, which compiles in a fraction of the time that lanes take.
"""

import math

import numpy as np

from nbnorm.cpu.kernels.rows import first_gradient, two_sum
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import larger, load_one, smaller, store_one

# deviations: where sqrt(eps) is more than so many, the variance is lost beside eps, whose own square may be beyond float64
EPS_ALONE = 2.0**40


@inlined
def rescaled(x, at, cols, eps):
    """A row whose squares leave the range of its type: factor, mean and rstd of factor * x; mean and rstd as they are.

    The first mean is in two parts. The factor, a power of two, brings the row's largest element near 1.
    """
    first = load_one(x, at)
    root_eps = np.sqrt(eps)
    is_constant = True
    largest = plain_mean = 0.0
    for k in range(at, at + cols):
        value = load_one(x, k)
        largest = larger(largest, abs(value))
        is_constant = is_constant and value == first
        plain_mean += value / cols
    # within what a float64 holds, so that the product is exact
    exponent = smaller(larger(math.frexp(largest)[1], -1000), 1000)
    factor = math.ldexp(1.0, -exponent)
    total = lost = 0.0
    for k in range(at, at + cols):
        # from the first element, as in `compensated`
        total, lost = two_sum(total, lost, load_one(x, k) * factor - first * factor)
    is_finite = abs(total) < np.inf
    if not is_finite:
        # of a row with Inf the mean is Inf, although what rounding lost, and the deviations, are NaN
        return factor, np.nan, np.nan, np.nan, plain_mean, np.nan
    if is_constant:
        # eps may vanish beside the row's scale, and 0 / 0 is not what the formula says
        return factor, first * factor, 0.0, 0.0 if eps > 0.0 else np.inf, first, 1.0 / root_eps
    mean = first * factor + (total + lost) / cols
    rest = lost = squares = lost_squares = 0.0
    for k in range(at, at + cols):
        d = load_one(x, k) * factor - mean
        rest, lost = two_sum(rest, lost, d)
        squares, lost_squares = two_sum(squares, lost_squares, d * d)
    rest = (rest + lost) / cols
    if root_eps * factor > EPS_ALONE:
        return factor, mean, rest, 1.0 / root_eps / factor, (mean + rest) / factor, 1.0 / root_eps
    variance = larger((squares + lost_squares) / cols - rest * rest, 0.0)
    rstd = 1.0 / np.sqrt(variance + (root_eps * factor) * (root_eps * factor))
    return factor, mean, rest, rstd, (mean + rest) / factor, rstd * factor


@inlined
def normalise_rescaled(x, at, cols, factor, hi, lo, rstd, weight, bias, first, y):
    """As `normalise`, for a row that is `rescaled`."""
    for j in range(cols):
        value = (load_one(x, at + j) * factor - hi - lo) * rstd
        if weight is not None:
            value *= load_one(weight, first + j)
        if bias is not None:
            value += load_one(bias, first + j)
        store_one(y, at + j, value)


@inlined
def gradient_means_rescaled(dy, x, at, cols, factor, hi, lo, rstd, weight):
    """The means of g, in two parts, and of g * x_hat, for a row that is `rescaled`."""
    shift = first_gradient(dy, at, weight, np.float64)
    mean_g = mean_gx = mean_x_hat = 0.0
    for j in range(cols):
        g = load_one(dy, at + j)
        if weight is not None:
            g *= load_one(weight, j)
        x_hat = (load_one(x, at + j) * factor - hi - lo) * rstd
        mean_g += (g - shift) / cols
        mean_gx += (g - shift) * x_hat / cols
        mean_x_hat += x_hat / cols
    g_hi, g_lo = two_sum(shift, 0.0, mean_g)
    # the last is 0 but for rounding
    return g_hi, g_lo, mean_gx - mean_g * mean_x_hat


@inlined
def gradients_rescaled(
    dy, x, at, cols, factor, hi, lo, scaled_rstd, rstd, g_hi, g_lo, mean_gx, weight, first, dx, dweight, dbias, sums_at
):
    """As `gradients`, for one row that is `rescaled`."""
    for j in range(cols):
        g = load_one(dy, at + j)
        x_hat = (load_one(x, at + j) * factor - hi - lo) * scaled_rstd
        if dweight is not None:
            dweight[sums_at + j] += g * x_hat
        if dbias is not None:
            dbias[sums_at + j] += g
        if dx is not None:
            if weight is not None:
                g *= load_one(weight, first + j)
            g = g - g_hi - g_lo - x_hat * mean_gx
            # where rstd is beyond float64, dx need not be
            store_one(dx, at + j, g * rstd if rstd < np.inf else g * scaled_rstd * factor)


@inlined
def row_rescaled(x, at, cols, eps, weight, bias, y):
    """Statistics and y of a whole row: writes y, and returns the mean and rstd of the row as it is."""
    factor, hi, lo, scaled_rstd, mean, rstd = rescaled(x, at, cols, eps)
    normalise_rescaled(x, at, cols, factor, hi, lo, scaled_rstd, weight, bias, 0, y)
    return mean, rstd


@inlined
def row_gradients_rescaled(dy, x, at, cols, eps, weight, dx, dweight, dbias, sums_at):
    """Statistics, means and gradients of a whole row."""
    factor, hi, lo, scaled_rstd, _, rstd = rescaled(x, at, cols, eps)
    g_hi, g_lo, mean_gx = gradient_means_rescaled(dy, x, at, cols, factor, hi, lo, scaled_rstd, weight)
    gradients_rescaled(
        dy, x, at, cols, factor, hi, lo, scaled_rstd, rstd, g_hi, g_lo, mean_gx, weight, 0, dx, dweight, dbias, sums_at
    )
