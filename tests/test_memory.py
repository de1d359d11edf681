"""Is the temporary memory bounded, whatever the number of rows and columns? (test_apply measures the command line's.)"""

import numpy as np
import pytest

from nbnorm import checks
from nbnorm.cpu import sizes, staging


def problem(rows, cols):
    return checks.forward(np.broadcast_to(1.0, (rows, cols)), cols, None, None, 1e-5, False, None, False, None)[0]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 1 << 30])
@pytest.mark.parametrize("cols", [1, 100, 1 << 14, 1 << 20, 1 << 25])
def test_sums_of_dweight_and_dbias(rows, cols):
    block_rows = sizes.block_rows(rows, cols)
    blocks = -(-rows // block_rows)
    assert block_rows >= sizes.MIN_BLOCK_ROWS
    assert blocks <= sizes.MAX_BLOCKS
    assert blocks == 1 or blocks * cols <= sizes.MAX_BLOCK_SUMS
    # enough of them for many threads where there are rows enough
    assert blocks >= min(32, rows // sizes.MIN_BLOCK_ROWS, sizes.MAX_BLOCK_SUMS // cols // 2)


@pytest.mark.parametrize(("rows", "cols"), [(1, 10), (1 << 30, 1), (1 << 20, 1000), (100, 1 << 25)])
def test_buffers(rows, cols):
    strided = np.broadcast_to(1.0, (rows, cols))
    limit = staging.block_limit(problem(rows, cols), 0, strided)
    assert limit == rows or limit == 1 or limit * cols <= staging.BUFFER_ELEMENTS
    assert limit == min(rows, max(1, staging.BUFFER_ELEMENTS // cols))


def test_arrays_that_are_ready_need_no_buffer():
    x = np.ones((1000, 1000), np.float32)
    case = checks.forward(x, 1000, None, None, 1e-5, False, None, False, None)[0]
    assert staging.block_limit(case, 0, x) == 1000
    assert staging.buffer_for(x, case, 1000) is None
