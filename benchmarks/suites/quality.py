"""Figures that depend little on what else the machine does: seconds over those of a copy, and errors. Less is better."""

import time
import timeit

from .problems import DEVICES, DTYPES, LARGE, MODES, PASSES, problem, use_threads

SECONDS = 1
MIN_TURNS = 5


class OverCopy:
    """The time of a call over that of moving the bytes that it must move: forward a copy, backward `dx = dy + x`.

    Of one thread's as well, since on busy cores threads wait for each other 8 ms, in calls and in copies alike.
    """

    params = (PASSES, LARGE, ("float32", "bfloat16"), ("one thread", "all threads", "cuda"))
    param_names = ("pass", "shape", "dtype", "runs_on")
    unit = "copies"

    def setup(self, pass_, shape, dtype, runs_on):
        self.problem = problem(pass_, shape, dtype, False, "cuda" if runs_on == "cuda" else "cpu")

    def track_seconds(self, pass_, shape, dtype, runs_on):
        call, move = self.problem.call, self.problem.move
        if runs_on == "cuda":
            from nbnorm.commands.report import cuda_medians

            call_seconds, move_seconds = cuda_medians(call, move)
            return four_digits(call_seconds / move_seconds)
        use_threads(1 if runs_on == "one thread" else None)
        try:
            return four_digits(median_ratio(call, move))
        finally:
            use_threads()


def median_ratio(call, move):
    """Of the times of the two, which take turns: those of one turn see the same state of the machine."""
    import numpy as np

    ratios = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < MIN_TURNS or time.perf_counter() < end:
        # untimed first, so that each finds its own arrays in the caches
        seconds = [timeit.repeat(function, number=1, repeat=2)[1] for function in (call, move)]
        ratios.append(seconds[0] / seconds[1])
    return np.median(ratios)


class Error:
    """The largest error of y, or of dx, dweight and dbias, in eps of the result's dtype, for rows with a mean of 100."""

    params = (PASSES, DTYPES, MODES, DEVICES)
    param_names = ("pass", "dtype", "use_diff_of_squares", "device")
    unit = "eps"

    def setup(self, pass_, *case):
        self.problem = problem(pass_, (64, 768), *case, mean=100)

    def track_largest(self, pass_, *case):
        import ml_dtypes
        import numpy as np

        results = self.problem.call()
        arrays = map(self.problem.read, results if pass_ == "backward" else [results])
        errors = [
            np.max(np.abs(array - exact) / scale) / ml_dtypes.finfo(array.dtype).eps
            for array, (exact, scale) in zip(arrays, exact_results(pass_, self.problem.hosts), strict=True)
        ]
        # asv would take NaN for a benchmark that is skipped
        if not np.all(np.isfinite(errors)):
            raise ArithmeticError(f"errors of {errors} eps")
        return four_digits(max(errors))


def four_digits(value):
    """As asv's tables show it whole."""
    return float(f"{value:.4g}")


def exact_results(pass_, hosts):
    """In longdouble, each with what its error is measured against: errors of sums over rows grow with sqrt(rows)."""
    import numpy as np

    from nbnorm import reference

    dy, x, weight, bias = (array.astype(np.longdouble) for array in (hosts.dy, hosts.x, hosts.weight, hosts.bias))
    if pass_ == "forward":
        scaled, _, _ = reference.layer_norm(x, 1, weight)
        return [(scaled + bias, np.abs(scaled) + np.abs(bias) + 1)]
    dx, *sums = reference.layer_norm_backward(dy, x, 1, weight)
    row_max = np.abs(dx).max(1, keepdims=True)
    return [(dx, np.abs(dx) + row_max), *((exact, np.abs(exact) + np.sqrt(len(x))) for exact in sums)]
