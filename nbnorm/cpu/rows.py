"""The arithmetic of one row, as jitted functions that the kernels share.

Each takes contiguous one-dimensional rows of float32 or float64, computes in the type `element`, which is the widest of all
operands, and sums in float64. A mean is kept in two parts, `hi` of that type and the small rest `lo`, so that
`(x - hi) - lo` loses no digits where the mean is large against the deviations: a float32 mean alone costs 1e-3 at
mean/std = 1e4.

Every function states its fast-math flags: a jitted helper without any inherits those of the caller that compiles it first.
"""

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
def input_gradient(dy, x, hi, lo, rstd, weight, mean_g, mean_gx, element, dx):
    """Write dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))."""
    g_hi, g_lo = split(mean_g, element)
    slope = element(mean_gx) * rstd
    for j in range(x.size):
        g = element(dy[j])
        if weight is not None:
            g = g * weight[j]
        dx[j] = (centre(g, g_hi, g_lo) - centre(x[j], hi, lo) * slope) * rstd


@njit(fastmath=ELEMENTWISE, error_model="numpy", cache=True)
def add_parameter_gradients(dy, x, hi, lo, rstd, dweight, dbias):
    """Add to the sums: dweight += dy * x_hat and dbias += dy, in float64; either may be None."""
    for j in range(x.size):
        g = np.float64(dy[j])
        if dweight is not None:
            dweight[j] += g * np.float64(centre(x[j], hi, lo) * rstd)
        if dbias is not None:
            dbias[j] += g
