"""The peak of a process, in bytes, in which x and, where there is one, `out` have 100 MB each."""

from .problems import PASSES, run_once

ROWS, COLS = 32768, 768
# in another process, so that the compiler's memory is not of this one
COMPILE = f"""
import numpy as np
import nbnorm
x, weight = np.ones((64, {COLS}), np.float32), np.ones({COLS}, np.float32)
nbnorm.layer_norm(x, {COLS}, weight, weight)
nbnorm.layer_norm_backward(x, x, {COLS}, weight)
"""


class Calls:
    params = (PASSES, ("out=", "new arrays", "strided"))
    param_names = ("pass", "results")

    def setup(self, pass_, results):
        run_once(COMPILE)
        import numpy as np

        pitch = COLS + 1 if results == "strided" else COLS
        self.weight = np.ones(COLS, np.float32)
        self.x = filled(pitch)
        self.out = None if results == "new arrays" else filled(pitch)

    def peakmem_call(self, pass_, results):
        import nbnorm

        x, out, weight = self.x, self.out, self.weight
        if pass_ == "forward":
            nbnorm.layer_norm(x, COLS, weight, weight, out=out)
        else:
            nbnorm.layer_norm_backward(x, x, COLS, weight, out=None if out is None else (out, None, None))


def filled(pitch):
    """Rows at this pitch, made without a temporary array."""
    import numpy as np

    memory = np.empty((ROWS, pitch), np.float32)
    memory[...] = np.arange(pitch)
    return memory[:, :COLS]
