"""Medians of calls on a CUDA device that take turns, between events on the device's own clock."""

import itertools
import random
import time

from numba import cuda
from timing import MIN_SAMPLES, summary

# before each round, of as many bytes as a large x has: 2 ms of an H200, in which a host enqueues a dozen calls
COPIES = 16


def measure(calls, sets, library, seconds, keep_busy):
    """A dict of median and quartiles in seconds and the number of samples for each call, in about `seconds` for all.

    A call takes a set of arrays, each time the next one. The calls of a round are enqueued one after the other, in an order
    that is shuffled, behind copies, which `keep_busy` enqueues one of, that keep the device busy meanwhile: so the time that
    the host takes for a call, of some microseconds, is not in the time of a kernel that may take ten.
    """
    samples = {name: [] for name in calls}
    order = random.Random(0)
    following = itertools.cycle(sets)
    end = time.perf_counter() + seconds
    while len(samples["limit"]) < MIN_SAMPLES or time.perf_counter() < end:
        turn = order.sample(list(calls), len(calls))
        events = {name: (library.event(), library.event()) for name in turn}
        for _ in range(COPIES):
            keep_busy()
        for name in turn:
            start, stop = events[name]
            start.record()
            calls[name](next(following))
            stop.record()
        cuda.synchronize()
        for name, (start, stop) in events.items():
            samples[name].append(library.milliseconds(start, stop) / 1e3)
    return {name: summary(values) for name, values in samples.items()}
