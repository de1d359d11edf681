"""`nbnorm warm`: the kernels of described calls on disk, for processes to come."""

import argparse
import logging
import sys

DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_command(commands, shape):
    """Add the command to a parser's; `shape` makes a tuple of the text of a shape."""
    command = commands.add_parser(
        "warm",
        help="compile kernels ahead of the first call",
        description="Compile the kernels that calls need and keep them on disk, where later processes find them.",
    )
    command.add_argument(
        "--normalized-shape",
        type=shape,
        required=True,
        nargs="+",
        metavar="N[,N...]",
        help="sizes of a row, as in 768 or 28,28",
    )
    command.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of x and dy (default: float32)")
    command.add_argument("--weight", choices=(*DTYPES, "none"), default="float32", help="its dtype (default: %(default)s)")
    command.add_argument("--bias", choices=(*DTYPES, "none"), default="float32", help="its dtype (default: %(default)s)")
    command.add_argument("--use-diff-of-squares", action="store_true", help="variance as mean(x^2) - mean(x)^2")
    command.add_argument("--rms", action="store_true", help="RMS norm, which has no bias")
    command.add_argument("--residual", action="store_true", help="norm of x plus a residual of the same dtype")
    command.add_argument("--total-out", action=argparse.BooleanOptionalAction, default=True, help="whether that is written")
    command.add_argument("--axis", type=_axis, metavar="N[,N...]", help="where not the last, as in 1 or --axis=-3")
    command.add_argument("--given-stats", action="store_true", help="backward is given mean and rstd")
    command.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True, help="whether it is called too")
    command.add_argument("--tensors", action="store_true", help="calls are on torch's tensors")
    command.add_argument("--rows", type=int, metavar="N", help="the most rows of a call; few need one build less")


def _axis(text):
    return tuple(int(number) for number in text.split(","))


def warm(options):
    """Returns the exit code: 1 where a kernel could not be kept."""
    from nbnorm.ahead import builds, entries_of
    from nbnorm.calls.problem import Description
    from nbnorm.cpu import choice
    from nbnorm.nopython import entries

    logger = logging.getLogger("nbnorm")
    handler = logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        wanted = []
        for dtype in options.dtype:
            statistics = ("float64" if dtype == "float64" else "float32") if options.given_stats else None
            for normalized_shape in options.normalized_shape:
                weight, bias = (None if name == "none" else name for name in (options.weight, options.bias))
                described = Description(
                    dtype, normalized_shape, weight, None if options.rms else bias, options.use_diff_of_squares,
                    options.backward, mean=None if options.rms else statistics, rstd=statistics, rows=options.rows,
                    is_rms=options.rms, residual=dtype if options.residual else None, total_out=options.total_out,
                    axis=options.axis,
                )  # fmt: skip
                wanted += builds(described)
        wanted = list(dict.fromkeys(wanted))
        for kernel, build in wanted:
            choice.ready(kernel, build)
        needed = entries_of(wanted) if options.tensors else []
        for entry in needed:
            entries.function(*entry)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    kept = [choice.is_kept(kernel, build) for kernel, build in wanted] + [entries.is_kept(*entry) for entry in needed]
    print(f"{sum(kept)} of {len(kept)} kernels kept on disk")
    return 0 if all(kept) else 1
