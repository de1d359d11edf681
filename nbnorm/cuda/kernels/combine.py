"""The kernels that combine what blocks of the others leave: the states of a row's segments, and the sums of the groups."""

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, types

from nbnorm.cuda.compiled import compiled
from nbnorm.cuda.instructions.meaning import inverse, inverse_power_of_two, store
from nbnorm.cuda.kernels.choices import ROUNDS_PAIRS
from nbnorm.cuda.kernels.known import Means, Room, Statistics
from nbnorm.cuda.kernels.reduce import inlined, team_sum, team_sums, thread_index
from nbnorm.cuda.kernels.rows import keep_means, keep_statistics, means_of, statistics_of
from nbnorm.cuda.kernels.signatures import pointer
from nbnorm.cuda.kernels.statistics import not_negative
from nbnorm.cuda.sizes import WARP

MERGE_THREADS = 256


def merge_signature(dtype):
    numbers = types.CPointer(pointer(dtype).dtype)
    return types.void(
        numbers,  # segment_states
        numbers,  # segment_means
        types.int64,  # cols
        types.int64,  # segments
        types.int64,  # segment_cols
        numbers,  # states
        numbers,  # means
    )


def add_groups_signature(dtype, result_dtype):
    result = pointer(result_dtype)
    return types.void(types.CPointer(pointer(dtype).dtype), types.int64, types.int64, result, result)


class Segments(NamedTuple):
    """Those of a row: where their states are, and which of these is the first one's; how many, of how many columns but for
    the last, and how many the row has.
    """

    states: Any
    first: Any
    number: Any
    width: Any
    cols: Any


@inlined
def cols_of(segments, s):
    return min(segments.width, segments.cols - s * segments.width)


@inlined
def ratio_of(factor, statistics):
    """What a segment's numbers are multiplied by where the row is by `factor`."""
    return factor * inverse_power_of_two(statistics.factor)


@inlined
def distance_of(statistics, ratio, origin):
    """How far a segment's mean is from the origin."""
    return statistics.hi * ratio - origin + statistics.lo * ratio


@inlined
def merged(segments, lane, shared, element):
    """The statistics of a row, from those of its segments."""
    first, number = segments.first, segments.number
    # the power of two for the whole row: exact where all segments have the same one, which is the row's then
    per_segment = inverse_power_of_two(element(number))
    total = element(0)
    for s in range(lane, number, MERGE_THREADS):
        total += per_segment * inverse_power_of_two(statistics_of(segments.states, first + s).factor)
    factor = inverse_power_of_two(team_sum(total, MERGE_THREADS, Room(shared, 0), element))

    # the mean, as its distance from the first segment's
    per_element = inverse(element(segments.cols))
    segment = statistics_of(segments.states, first)
    origin = segment.hi * ratio_of(factor, segment)
    total = element(0)
    for s in range(lane, number, MERGE_THREADS):
        segment = statistics_of(segments.states, first + s)
        ratio = ratio_of(factor, segment)
        count = element(cols_of(segments, s))
        total += count * per_element * distance_of(segment, ratio, origin)
    distance = team_sum(total, MERGE_THREADS, Room(shared, WARP), element)

    # the variance
    total = element(0)
    for s in range(lane, number, MERGE_THREADS):
        segment = statistics_of(segments.states, first + s)
        ratio = ratio_of(factor, segment)
        count = element(cols_of(segments, s))
        d = distance_of(segment, ratio, origin) - distance
        total += (segment.var * ratio * ratio + count * d * d) * per_element
    var = not_negative(team_sum(total, MERGE_THREADS, Room(shared, 2 * WARP), element), element)
    return Statistics(factor, origin, distance, var)


@functools.cache
def merge(compute_capability, dtype, has_states=True, has_means=False):
    """One block owns a long row, and makes its state and its means of those of its segments, in their order.

    Without states, which given statistics need not, the means are sums.
    Formula: Chan, Golub and LeVeque 1983, eq. 2.1, and the same for g times the deviation.
    """
    element = getattr(np, dtype)
    shared_size = 5 * WARP

    @compiled(compute_capability, MERGE_THREADS)
    def kernel(segment_states, segment_means, cols, segments, segment_cols, states, means):
        shared = cuda.shared.array(shared_size, element)
        lane = thread_index()
        row = np.int64(cuda.blockIdx.x)
        start = row * segments
        statistics = Statistics(element(1), element(0), element(0), element(0))

        if has_states:
            statistics = merged(Segments(segment_states, start, segments, segment_cols, cols), lane, shared, element)
            if lane == 0:
                keep_statistics(states, row, statistics)

        # the means of g, and of g times the deviation
        if has_means:
            factor, origin, distance, _ = statistics
            mean_g = element(0)
            mean_gd = element(0)
            shift = element(0)
            for s in range(lane, segments, MERGE_THREADS):
                g, gd, shift = means_of(segment_means, start + s)
                if has_states:
                    segment = statistics_of(segment_states, start + s)
                    ratio = ratio_of(factor, segment)
                    gd = gd * ratio + g * (distance_of(segment, ratio, origin) - distance)
                mean_g += g
                mean_gd += gd
            mean_g, mean_gd = team_sums(mean_g, mean_gd, MERGE_THREADS, Room(shared, 3 * WARP), element)
            if lane == 0:
                # thread 0 has read a segment, and the shift is the same in each
                keep_means(means, row, Means(mean_g, mean_gd, shift))

    return kernel


@functools.cache
def add_groups(compute_capability, dtype, result_dtype, warps):
    """One block owns a warp's width of columns of dweight, or of dbias behind it, and adds up the groups' sums.

    Each warp adds up every so manieth group, and the first one then what the warps have, in their order.
    """
    element = getattr(np, dtype)
    threads = warps * WARP
    rounds_pairs = int(compute_capability >= ROUNDS_PAIRS)

    @compiled(compute_capability, threads)
    def kernel(sums, groups, cols, dweight, dbias):
        shared = cuda.shared.array(threads, element)
        value = cuda.local.array(1, element)
        lane = thread_index() % WARP
        warp = thread_index() // WARP
        blocks = (cols + WARP - 1) // WARP
        is_second = cuda.blockIdx.x >= blocks
        j = (cuda.blockIdx.x - (blocks if is_second else 0)) * WARP + lane
        total = element(0)
        if j < cols:
            group = np.int64(warp)
            while group < groups:
                total += sums[((groups if is_second else 0) + group) * cols + j]
                group += warps
        shared[thread_index()] = total
        cuda.syncthreads()
        if warp == 0 and j < cols:
            value[0] = total
            for i in range(1, warps):
                value[0] += shared[i * WARP + lane]
            if is_second:
                store(value, 0, dbias, j, 1, 1, rounds_pairs)
            else:
                store(value, 0, dweight, j, 1, 1, rounds_pairs)

    return kernel
