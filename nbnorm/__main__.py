"""The command line: `python -m nbnorm`, also installed as `nbnorm`."""

import argparse
import signal
import sys

DESCRIPTION = "Layer norm as Numba-compiled kernels. Without a command: what this machine offers, checked and timed."


def parser():
    result = argparse.ArgumentParser(prog="nbnorm", description=DESCRIPTION)
    commands = result.add_subparsers(dest="command", metavar="COMMAND")
    apply = commands.add_parser("apply", help="layer norm of a .npy file", description="Layer norm of an array on disk.")
    apply.add_argument("input", metavar="INPUT.npy", help="the array, of any size and order; it is only read")
    apply.add_argument("-o", "--output", metavar="OUT.npy", required=True, help="written when the result is complete")
    apply.add_argument(
        "--normalized-shape", type=int, nargs="+", required=True, metavar="N", help="as in `--normalized-shape 768`"
    )
    apply.add_argument("--weight", metavar="W.npy", help="scale of each element of a row")
    apply.add_argument("--bias", metavar="B.npy", help="shift of each element of a row")
    apply.add_argument("--eps", type=float, default=1e-5, help="added to the variance (default: %(default)s)")
    apply.add_argument("--use-diff-of-squares", action="store_true", help="variance as mean(x²) - mean(x)²")
    apply.add_argument("--dtype", choices=["float16", "float32", "float64"], help="of the result (default: the input's)")
    return result


def main(arguments=None):
    """Run the command line; returns the exit code: 0, 1 for a failed check, 2 for an error, 130 when interrupted."""
    options = parser().parse_args(arguments)
    if options.command is None:
        # imported here, since what `--help` prints needs no Numba
        from nbnorm.report import report

        return 0 if report() else 1
    return _apply(options)


def _apply(options):
    from nbnorm.apply import apply

    # a terminated run cleans up after itself as an interrupted one does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        applied = apply(
            options.input,
            options.output,
            options.normalized_shape,
            options.weight,
            options.bias,
            options.eps,
            options.use_diff_of_squares,
            options.dtype,
        )
    except (OSError, ValueError, TypeError, MemoryError) as error:
        print("nbnorm:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"nbnorm: interrupted, {options.output} was not written", file=sys.stderr)
        return 130
    print(f"{options.output}: {applied.shape} {applied.dtype}; ", end="")
    print(f"largest error {applied.largest_error:.2f} eps in {applied.checked_rows} rows checked against longdouble")
    return 0


if __name__ == "__main__":
    sys.exit(main())
