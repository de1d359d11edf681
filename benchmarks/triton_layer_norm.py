"""Layer norm as Triton kernels of the shape of the tutorial's: a program owns a row, which forward reads three times."""

import torch
import triton
import triton.language as tl

# warps of programs that a multiprocessor has at once, backward
RESIDENT_WARPS = 32
# of the sums that the second kernel takes at once
TILE = {"ROWS": 32, "COLUMNS": 64}


@triton.jit
def kernel(x, y, weight, bias, pitch, cols, eps, BLOCK: tl.constexpr):  # noqa: N803  Triton's way
    row = tl.program_id(0).to(tl.int64) * pitch
    columns = tl.arange(0, BLOCK)

    # mean
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, cols, BLOCK):
        j = first + columns
        total += tl.load(x + row + j, mask=j < cols, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / cols

    # variance
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, cols, BLOCK):
        j = first + columns
        values = tl.load(x + row + j, mask=j < cols, other=0.0).to(tl.float32)
        deviations = tl.where(j < cols, values - mean, 0.0)
        total += deviations * deviations
    scale = 1 / tl.sqrt(tl.sum(total, axis=0) / cols + eps)

    # normalise
    for first in range(0, cols, BLOCK):
        j = first + columns
        mask = j < cols
        values = tl.load(x + row + j, mask=mask, other=0.0).to(tl.float32)
        scales = tl.load(weight + j, mask=mask)
        shifts = tl.load(bias + j, mask=mask)
        tl.store(y + row + j, (values - mean) * scale * scales + shifts, mask=mask)


def layer_norm(x, weight, bias, y, eps):
    """The tutorial's choice of a block and of its warps. Returns y."""
    rows, cols = x.shape
    block = triton.next_power_of_2(cols)
    warps = min(max(block // 256, 1), 8)
    kernel[(rows,)](x, y, weight, bias, x.stride(0), cols, eps, BLOCK=block, num_warps=warps)
    return y


@triton.jit
def backward_kernel(
    dy, x, weight, mean, rstd, dx, dweights, dbiases, rows, cols, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    """A program takes every so manieth row, and leaves the sums over its rows in rows of their own, which need no locks."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < cols
    scales = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * cols + columns
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        dys = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        x_hat = (values - tl.load(mean + row)) * scale
        dweight += dys * x_hat
        dbias += dys
        g = dys * scales
        mean_g = tl.sum(g, axis=0) / cols
        mean_gx = tl.sum(g * x_hat, axis=0) / cols
        tl.store(dx + at, (g - mean_g - x_hat * mean_gx) * scale, mask=mask)
    tl.store(dweights + program * cols + columns, dweight, mask=mask)
    tl.store(dbiases + program * cols + columns, dbias, mask=mask)


@triton.jit
def sum_kernel(parts, total, rows, cols, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    """The sums over all rows: program i of the first axis owns columns, that of the second one of two matrices."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        i = first + tl.arange(0, ROWS)
        at = (which * rows + i).to(tl.int64)[:, None] * cols + j[None, :]
        sums += tl.load(parts + at, mask=(i < rows)[:, None] & (j < cols)[None, :], other=0.0)
    tl.store(total + which * cols + j, tl.sum(sums, axis=0), mask=j < cols)


def layer_norm_backward(dy, x, weight, mean, rstd):
    """Of matrices in C order. Returns dx, dweight and dbias."""
    rows, cols = x.shape
    block = triton.next_power_of_2(cols)
    # more than the tutorial's 8 for long rows, which would not stay in the registers of so few
    warps = min(max(block // 256, 1), RESIDENT_WARPS)
    programs = min(rows, torch.cuda.get_device_properties(x.device).multi_processor_count * RESIDENT_WARPS // warps)
    dx = torch.empty_like(x)
    parts = torch.empty((2, programs, cols), dtype=torch.float32, device=x.device)
    sums = torch.empty((2, cols), dtype=weight.dtype, device=x.device)
    backward_kernel[(programs,)](dy, x, weight, mean, rstd, dx, *parts, rows, cols, BLOCK=block, num_warps=warps)
    sum_kernel[(triton.cdiv(cols, TILE["COLUMNS"]), 2)](parts, sums, programs, cols, **TILE)
    return dx, sums[0], sums[1]
