"""What the kernels of whole rows, or of their segments, take: the types of their arguments."""

from numba import types

# what an element is in memory; numba-cuda has no bfloat16 that its arrays or pointers could be of
STORAGE = {"float16": types.uint16, "bfloat16": types.int16, "float32": types.float32, "float64": types.float64}


def pointer(dtype_name):
    """The type of an address; where there is nothing, of any."""
    return types.CPointer(STORAGE[dtype_name or "float32"])


def added_type(*dtypes):
    """Of a residual and the total, or of dtotal: each is an address, and the elements from one row to the next.

    Where nothing is added, nothing is handed over.
    """
    has_any = dtypes[0] is not None
    return types.Tuple([kind for dtype in dtypes for kind in (pointer(dtype), types.int64) if has_any])


def forward(operand_dtypes, dtype):
    x_dtype, weight_dtype, bias_dtype, residual_dtype, total_dtype = operand_dtypes
    computed = pointer(dtype).dtype
    statistics_dtype = "float64" if x_dtype == "float64" else "float32"
    return types.void(
        pointer(x_dtype),  # x
        pointer(weight_dtype),  # weight
        pointer(bias_dtype),  # bias
        types.int64,  # rows
        types.int64,  # cols
        types.int64,  # segments
        types.int64,  # segment_cols; of rows that lie abreast, how far apart their columns are
        types.int64,  # x_pitch: elements from one row to the next
        types.int64,  # y_pitch
        computed,  # eps
        computed,  # eps_power: of two, the largest that is not above the root of eps
        computed,  # eps_rest: what 1 / root is times that
        types.boolean,  # has_statistics
        pointer(x_dtype),  # y
        pointer(statistics_dtype),  # mean
        pointer(statistics_dtype),  # rstd
        types.CPointer(computed),  # states
        added_type(residual_dtype, total_dtype),  # added
    )


def backward(operand_dtypes, dtype):
    dy_dtype, x_dtype, weight_dtype, mean_dtype, rstd_dtype, dtotal_dtype = operand_dtypes
    computed = pointer(dtype).dtype
    return types.void(
        pointer(dy_dtype),  # dy
        pointer(x_dtype),  # x
        pointer(weight_dtype),  # weight
        pointer(mean_dtype),  # mean
        pointer(rstd_dtype),  # rstd
        types.int64,  # rows
        types.int64,  # cols
        types.int64,  # groups
        types.int64,  # segments
        types.int64,  # segment_cols, as forward
        types.int64,  # dy_pitch: elements from one row to the next
        types.int64,  # x_pitch
        types.int64,  # dx_pitch
        computed,  # eps
        computed,  # eps_power: of two, the largest that is not above the root of eps
        computed,  # eps_rest: what 1 / root is times that
        pointer(x_dtype),  # dx
        types.CPointer(computed),  # states
        types.CPointer(computed),  # means
        types.CPointer(computed),  # sums
        added_type(dtotal_dtype),  # added
    )
