"""Medians of calls that take turns, so that all of them see the same state of the machine."""

import random
import time
import timeit

import numpy as np

# a sample takes at least this long, a thousand times what the clock resolves
SAMPLE_SECONDS = 50e-6
# of each contestant, however slow
MIN_SAMPLES = 5


def measure(calls, seconds, clock=time.perf_counter):
    """A dict of median and quartiles in seconds and the number of samples for each call, in about `seconds` for all.

    The calls take turns in an order that is shuffled each round. One whose share of the time is used up sits out once it
    has enough samples.
    """
    timers = {name: timeit.Timer(call, timer=clock) for name, call in calls.items()}
    repeats = {name: calls_in_a_sample(timer) for name, timer in timers.items()}
    samples = {name: [] for name in calls}
    share = {name: seconds / len(calls) for name in calls}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while turn := [
        name for name in calls if len(samples[name]) < MIN_SAMPLES or (share[name] > 0 and time.perf_counter() < end)
    ]:
        order.shuffle(turn)
        for name in turn:
            start = time.perf_counter()
            # untimed: it wakes this contestant's threads, and puts its own arrays into the caches in place of the last one's
            timers[name].timeit(1)
            samples[name].append(timers[name].timeit(repeats[name]) / repeats[name])
            share[name] -= time.perf_counter() - start
    return {name: summary(values) for name, values in samples.items()}


def calls_in_a_sample(timer):
    calls = 1
    while timer.timeit(calls) < SAMPLE_SECONDS:
        calls *= 2
    return calls


def summary(samples):
    lower, median, upper = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "samples": len(samples)}
