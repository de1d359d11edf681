"""The arithmetic of one row, as jitted functions that the kernels share.

Each takes contiguous one-dimensional rows of float32 or float64, computes in the type `element`, which is the widest of all
operands, and sums in float64. A mean is kept in two parts, `hi` of that type and the small rest `lo`, so that
`(x - hi) - lo` loses no digits where the mean is large against the deviations: a float32 mean alone costs 1e-3 at
mean/std = 1e4.

Every function states its fast-math flags: a jitted helper without any inherits those of the caller that compiles it first.
"""

import math

import numpy as np
from numba import njit

# what vectorises a sum; nnan and ninf would delete the meaning of NaN and Inf, arcp turns 1/sqrt(inf) into NaN
SUMS = {"reassoc", "contract", "nsz"}
# fused multiply-add only: the order of (x - hi) - lo stays as written
ELEMENTWISE = {"contract"}


@njit(fastmath=False, error_model="numpy", cache=True)
def centre(x, hi, lo):
    return (x - hi) - lo


@njit(fastmath=False, error_model="numpy", cache=True)
def split(value, element):
    """`value` as a sum of two numbers of the type `element`."""
    hi = element(value)
    return hi, element(value - np.float64(hi))


@njit(fastmath=SUMS, error_model="numpy", cache=True)
def centred(x, element):
    """hi, lo and variance of a row: the mean first, then the deviations from it (Chan, Golub and LeVeque 1983, eq. 1.7)."""
    per_element = 1.0 / np.float64(x.size)

    total = 0.0
    for j in range(x.size):
        total += np.float64(x[j])
    hi = element(total * per_element)

    # what rounding left of the mean in the deviations, and the squares corrected by it
    total = 0.0
    squares = 0.0
    for j in range(x.size):
        d = np.float64(centre(x[j], hi, element(0)))
        total += d
        squares += d * d
    rest = total * per_element
    return hi, element(rest), max(squares * per_element - rest * rest, 0.0)


@njit(fastmath=SUMS, error_model="numpy", cache=True)
def diff_of_squares(x, element):
    """hi, lo and variance of a row from one sweep, `mean(x²) - mean(x)²` clamped at 0."""
    per_element = 1.0 / np.float64(x.size)
    total = 0.0
    squares = 0.0
    for j in range(x.size):
        v = np.float64(x[j])
        total += v
        squares += v * v
    mean = total * per_element
    hi, lo = split(mean, element)
    return hi, lo, max(squares * per_element - mean * mean, 0.0)


@njit(fastmath=False, error_model="numpy", cache=True)
def reciprocal_std(variance, eps):
    return 1.0 / np.sqrt(variance + eps)


@njit(fastmath=ELEMENTWISE, error_model="numpy", cache=True)
def normalise(x, hi, lo, rstd, weight, bias, y):
    """Write y = (x - mean) * rstd * weight + bias; weight and bias may be None."""
    for j in range(x.size):
        value = centre(x[j], hi, lo) * rstd
        if weight is not None:
            value = value * weight[j]
        if bias is not None:
            value = value + bias[j]
        y[j] = value


@njit(fastmath=SUMS, error_model="numpy", cache=True)
def gradient_means(dy, x, hi, lo, rstd, weight):
    """The means over a row of g, g * x_hat and x_hat, where g = dy * weight and x_hat = (x - mean) * rstd."""
    total = 0.0
    projected = 0.0
    deviations = 0.0
    for j in range(x.size):
        g = np.float64(dy[j])
        if weight is not None:
            g = g * np.float64(weight[j])
        d = np.float64(centre(x[j], hi, lo))
        total += g
        projected += g * d
        deviations += d
    per_element = 1.0 / np.float64(x.size)
    scale = per_element * np.float64(rstd)
    return total * per_element, projected * scale, deviations * scale


@njit(fastmath=ELEMENTWISE, error_model="numpy", cache=True)
def input_gradient(dy, x, hi, lo, rstd, weight, mean_g, mean_gx, factor, element, dx):
    """Write dx = factor * (g - mean(g) - x_hat * mean(g * x_hat)), where factor is rstd unless the row is rescaled."""
    g_hi, g_lo = split(mean_g, element)
    slope = element(mean_gx) * rstd
    for j in range(x.size):
        g = element(dy[j])
        if weight is not None:
            g = g * weight[j]
        dx[j] = (centre(g, g_hi, g_lo) - centre(x[j], hi, lo) * slope) * factor


@njit(fastmath=ELEMENTWISE, error_model="numpy", cache=True)
def add_parameter_gradients(dy, x, hi, lo, rstd, dweight, dbias):
    """Add to the sums: dweight += dy * x_hat and dbias += dy, in float64; either may be None."""
    for j in range(x.size):
        g = np.float64(dy[j])
        if dweight is not None:
            dweight[j] += g * np.float64(centre(x[j], hi, lo) * rstd)
        if dbias is not None:
            dbias[j] += g


@njit(fastmath=False, error_model="numpy", cache=True)
def rescaled(x, eps):
    """A row whose squares leave the range of its type: row, hi, lo and rstd rescaled; mean and rstd as they are.

    It is divided, in float64, by the power of two that brings its largest element, or sqrt(eps), near 1.
    """
    largest = root_eps = np.sqrt(eps)
    is_constant = True
    for j in range(x.size):
        largest = max(largest, abs(np.float64(x[j])))
        is_constant = is_constant and x[j] == x[0]
    exponent = math.frexp(largest)[1]
    row = np.empty(x.size, np.float64)
    for j in range(x.size):
        row[j] = np.ldexp(np.float64(x[j]), -exponent)
    hi, lo, var = centred(row, np.float64)
    if not abs(hi) < np.inf:
        # the mean of a row with Inf is Inf, although the deviations from it are NaN
        lo = 0.0
    elif is_constant and eps > 0.0:
        # eps may vanish beside the row's scale, and 0 / 0 is not what the formula says
        return row, row[0], 0.0, 0.0, np.float64(x[0]), 1.0 / root_eps
    rstd = reciprocal_std(var, np.ldexp(root_eps, -exponent) ** 2)
    return row, hi, lo, rstd, np.ldexp(hi + lo, exponent), np.ldexp(rstd, -exponent)


@njit(fastmath=False, error_model="numpy", cache=True)
def normalise_extreme(x, eps, weight, bias, y):
    """Write y of such a row; returns its mean and rstd."""
    row, hi, lo, row_rstd, mean, rstd = rescaled(x, eps)
    normalise(row, hi, lo, row_rstd, weight, bias, y)
    return mean, rstd


@njit(fastmath=False, error_model="numpy", cache=True)
def gradients_extreme(dy, x, eps, weight, dx, dweight, dbias):
    """All gradients of such a row; dx, dweight and dbias may be None."""
    row, hi, lo, row_rstd, _, rstd = rescaled(x, eps)
    if dweight is not None or dbias is not None:
        add_parameter_gradients(dy, row, hi, lo, row_rstd, dweight, dbias)
    if dx is not None:
        mean_g, mean_gx, mean_x_hat = gradient_means(dy, row, hi, lo, row_rstd, weight)
        mean_gx -= mean_g * mean_x_hat
        input_gradient(dy, row, hi, lo, row_rstd, weight, mean_g, mean_gx, rstd, np.float64, dx)
