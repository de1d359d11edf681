"""The kernels that are compiled and run without a device: those of every choice there is, each as a `Variant`.

They are the ends of what a thread holds and of what it may access at once, and each dtype, mode, mask and step.
"""

import itertools

from offline import Variant, steps

FULL = (9, 0)
# Turing is the oldest that CUDA 13 builds for; 8.0 is the first to round bfloat16 itself; 10.0 the newest of the servers'
OTHERS = ((7, 5), (8, 0), (10, 0))
# the tiles of float16 are those of bfloat16, from which it differs by conversions alone: it has variants of its own
DTYPES = ("float32", "bfloat16", "float64")
COLS = {
    "forward": (
        5,  # odd: elements one by one, a part of a warp
        64,  # one or two vectors a thread, a part of a warp
        256,  # the same with more, in float64 a warp
        768,  # a warp, which is full, a model's usual size
        1000,  # the last vector is there for some of the threads
        1001,  # the most elements of a thread, one by one
        4096,  # several warps, full
        4100,  # several warps, the last vector for few of the threads; 16-bit vectors of 8 bytes
        8192,  # the longest row in float64: 1024 threads
        32768,  # the longest row: 1024 threads, which hold all that they can; in float64 two steps
        32767,  # and one by one, which takes the most addresses
    ),
    "backward": (
        5,
        64,  # a part of a warp, whose teams add up by shuffles too
        127,  # the same with the most elements of a thread, one by one
        500,  # the most rows of a warp, the last vector for some of its threads; 16-bit vectors of 8 bytes
        1001,  # two warps, one by one
        2048,  # several warps, full; the longest row in float64
        2047,
        4100,
        8192,  # the longest row: 512 threads
        6143,  # and one by one
        8191,
    ),
}
# a long row in full segments and vectors, and one by one with a rest
LONG_COLS = (131072, 131073)
# weight and bias where they are not both of x's dtype; float64 makes all float64
PARAMETERS = ((None, None), ("float32", "float32"), ("float64", "float64"), ("float32", None), (None, "float64"))
# dy, x and weight where they are not of one dtype; a 16-bit vector in float64 takes the most registers
MIXED = (
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", None),
    ("float64", "bfloat16", "float16"),
    ("float16", "float64", "float32"),
    ("bfloat16", "float16", "float64"),
)
MASKS = [mask for mask in itertools.product((True, False), repeat=3) if any(mask) and not all(mask)]


def forward_variants():
    def of(dtype, cols, *parameters, **choices):
        return steps("forward", (dtype, *(parameters or (dtype, dtype))), cols, **choices)

    for cols, dtype in itertools.product((*COLS["forward"], *LONG_COLS), DTYPES):
        yield from of(dtype, cols)
    for parameters, dtype in itertools.product(PARAMETERS, DTYPES):
        yield from of(dtype, 4096, *parameters)
    for cols in (64, 1001, 131072):
        yield from of("float16", cols)
    # wide parameters beside as much of a row as a thread holds leave the fewest registers
    for cols, dtype in itertools.product((32768, 32767), ("float32", "float16")):
        yield from of(dtype, cols, "float32", "float32")
    yield from of("float32", 8192, "float64", "float64")
    # one sweep less: in a part of a warp, in a block, in the first step of a long row
    for cols, dtype in itertools.product((64, 4096, 131072), DTYPES):
        yield from (v for v in of(dtype, cols, variance="diff_of_squares") if v.step != "normalise")
    # addresses of x and y, or of weight and bias, that do not allow the whole of a vector
    for dtype, most in (("float32", 4), ("bfloat16", 8), ("float16", 8), ("float64", 2)):
        for access in (most // 2, 1):
            yield from of(dtype, 4096, access=access)
            yield from of(dtype, 4096, parameter_access=min(access, 2))


def backward_variants():
    def of(dtype, cols, statistics=(None, None), **choices):
        return steps("backward", (dtype, dtype, dtype, *statistics), cols, **choices)

    def returned(dtype):
        """The dtype of mean and rstd as the forward pass returns them."""
        return ("float64" if dtype == "float64" else "float32",) * 2

    for cols, dtype in itertools.product((*COLS["backward"], *LONG_COLS), DTYPES):
        # in float64 these are long too
        if dtype != "float64" or not 2048 < cols < 100000:
            yield from of(dtype, cols)
    for cols in (64, 1001, 131072):
        yield from of("float16", cols)
    # given statistics, which spare sums: where a row has the fewest threads, the most, and in both steps
    for cols, dtype in itertools.product((64, 2048, 8191, *LONG_COLS), DTYPES):
        if dtype != "float64" or cols != 8191:
            yield from of(dtype, cols, returned(dtype))
    yield from of("bfloat16", 4096, ("float16", "bfloat16"))
    yield from of("float32", 2048, ("float64", "float32"))
    for cols, dtype in itertools.product((64, 2048, 131072), DTYPES):
        yield from (v for v in of(dtype, cols, variance="diff_of_squares") if v.step != "gradients")
    # what is not asked for is neither read nor computed: in teams that add up, in a block, with given statistics, and in
    # the steps of a long row
    for mask in MASKS:
        with_dx, with_dweight, _ = mask
        for statistics in ((None, None), returned("float32")):
            # as a call chooses them: weight is read for dx alone, and nothing but dy for dbias alone
            weight = "float32" if with_dx else None
            is_given = statistics[0] is not None
            if is_given and not (with_dx or with_dweight):
                continue
            operands = ("float32", "float32", weight, *statistics)
            for cols in (2048, 131072) if is_given else (64, 2048, 131072):
                for variant in steps("backward", operands, cols, output_mask=mask):
                    # the first step is left out where it would have nothing to do
                    if variant.step != "means" or with_dx or (with_dweight and not is_given):
                        yield variant
    for mask, dtype in itertools.product(((True, False, False), (False, True, True)), ("bfloat16", "float64")):
        yield from steps("backward", (dtype, dtype, dtype if mask[0] else None, None, None), 2048, output_mask=mask)
    for operands, cols in itertools.product(MIXED, (2048, 131072)):
        yield from steps("backward", (*operands, None, None), cols)
    # the most of a row, beside wide operands
    for cols in (8192, 8191):
        yield from steps("backward", ("float32", "bfloat16", "float32", None, None), cols)
    # addresses of x and dx, of dy, or of weight, that do not allow the whole of a vector
    for dtype, most in (("float32", 4), ("bfloat16", 8), ("float64", 2)):
        for access in (most // 2, 1):
            yield from of(dtype, 2048, access=access)
            yield from of(dtype, 2048, dy_access=access)
        yield from of(dtype, 2048, parameter_access=1)
    yield from of("float16", 2048, access=1, dy_access=2)


def rms_variants():
    """In a part of a warp, a block, segments; as `test_rms.py` has them, too."""
    of_rms = {"variance": "mean_square"}
    for cols in (64, 1100, 131072):
        yield from steps("forward", ("float32", "float32", None), cols, **of_rms)
    yield from steps("forward", ("bfloat16", "bfloat16", None), 4096, **of_rms)
    of_rms["output_mask"] = (True, True, False)
    for cols in (64, 131072):
        yield from steps("backward", ("float32",) * 3 + (None, None), cols, **of_rms)
    # given rstd alone, and without dweight
    yield from steps("backward", ("float32",) * 3 + (None, "float32"), 64, **of_rms)
    of_rms["output_mask"] = (True, False, False)
    yield from steps("backward", ("bfloat16",) * 3 + (None, None), 2048, **of_rms)


def added_variants():
    """Of a sum, written or not, and of dx with dtotal; as `test_residual.py` has them, too."""
    for cols in (64, 1100, 131072):
        yield from steps("forward", ("float32", "float32", None), cols, beside="float32", with_total=True)
    yield from steps("forward", ("float32", "float32", None), 131072, beside="float32")
    # the most elements of a thread, one by one; a residual that is wider; no mean
    yield from steps("forward", ("float16",) * 3, 1001, beside="float16", with_total=True)
    of_rms = {"variance": "mean_square"}
    yield from steps("forward", ("bfloat16", "bfloat16", None), 4096, beside="float32", with_total=True, **of_rms)
    yield from steps("forward", ("float32", "float32", None), 1100, beside="float32", **of_rms)
    for cols in (2048, 131072):
        yield from steps("backward", ("float32",) * 3 + (None, None), cols, beside="float32")
    of_rms["output_mask"] = (True, True, False)
    yield from steps("backward", ("bfloat16", "float32", None, None, None), 64, beside="float16", **of_rms)


# rows that lie abreast, which `test_abreast.py` has: as many elements of a thread as usual, and the most; 32 rows and 16
ABREAST = [
    Variant("forward", ("float32",) * 3, 96, is_abreast=True),
    Variant("forward", ("bfloat16",) * 3, 512, beside="bfloat16", with_total=True, is_abreast=True),
    Variant("forward", ("float64",) * 3, 256, is_abreast=True),
    Variant("backward", (*("float32",) * 3, None, None), 96, is_abreast=True),
    Variant("backward", (*("bfloat16",) * 3, None, None), 512, beside="bfloat16", is_abreast=True),
]
VARIANTS = list(dict.fromkeys([*forward_variants(), *backward_variants(), *rms_variants(), *added_variants()]))
PROBLEMS = [(FULL, variant) for variant in VARIANTS]
# each of the others gets a twentieth, with every dtype: the source is the same but for rounding
PROBLEMS += [(capability, v) for first, capability in enumerate(OTHERS) for v in VARIANTS[first::20]]
