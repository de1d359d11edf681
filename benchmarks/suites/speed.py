"""Seconds of calls whose kernels are compiled and whose arrays are made."""

import time

from .problems import DEVICES, DTYPES, LARGE, MODES, OTHERS, PASSES, channels_first, other, problem, use_threads

SMALL = ((1, 64), (8, 768), (32, 768))
# samples in each process: at least 5, at most 50, else as many as half a second has
REPEAT = (5, 50, 0.5)


class LargeCalls:
    params = (PASSES, LARGE, DTYPES, MODES, DEVICES)
    param_names = ("pass", "shape", "dtype", "use_diff_of_squares", "device")
    repeat = REPEAT

    def setup(self, *case):
        self.problem = problem(*case)

    def time_call(self, *case):
        self.problem.call()
        self.problem.wait()


class OtherNorms:
    """On the CPU, with `out=`: RMS norm, and the norms of x + residual, which write that sum too."""

    params = (OTHERS, PASSES, ((8192, 768), (65536, 256)), ("float32", "bfloat16"))
    param_names = ("norm", "pass", "shape", "dtype")
    # half as long as the others, which have the same kernels
    repeat = (5, 25, 0.25)

    def setup(self, *case):
        self.call = other(*case)

    def time_call(self, *case):
        self.call()


class ChannelsFirst:
    """On the CPU, with `out=`, over axis 1 of images."""

    params = (PASSES, ((16, 96, 56, 56), (16, 256, 32, 32)), ("float32", "bfloat16"))
    param_names = ("pass", "shape", "dtype")
    repeat = (5, 25, 0.25)

    def setup(self, *case):
        self.call = channels_first(*case)

    def time_call(self, *case):
        self.call()


class SmallCalls:
    """A thousand calls a sample: a millisecond is a microsecond a call.

    On the CPU one thread does this work, so it is the processor's time that is taken: at a load of 7 on 2 cores medians of
    it differed by up to 6 %, medians of wall-clock time by 27 to 84 %.
    """

    params = (PASSES, SMALL, ("out=", "new arrays"), DEVICES)
    param_names = ("pass", "shape", "results", "device")
    repeat = REPEAT

    def setup(self, pass_, shape, results, device):
        self.problem = problem(pass_, shape, "float32", False, device, has_out=results == "out=")
        self.timer = time.process_time if device == "cpu" else time.perf_counter

    def time_1000_calls(self, *case):
        call = self.problem.call
        for _ in range(1000):
            call()
        self.problem.wait()


class Threads:
    params = (PASSES, (1, 2, 4, 8, 16))
    param_names = ("pass", "threads")
    repeat = REPEAT

    def setup(self, pass_, threads):
        use_threads(threads)
        self.problem = problem(pass_, LARGE[0], "float32", False, "cpu")

    def teardown(self, *case):
        use_threads()

    def time_call(self, *case):
        self.problem.call()
