"""The command line: `python -m nbnorm`, also installed as `nbnorm`."""

import argparse
import io
import os
import signal
import sys
from contextlib import contextmanager

from nbnorm import __version__, warm

DESCRIPTION = "Layer norm as Numba-compiled kernels. Without a command: what this machine offers, checked and timed."


def main(arguments=None):
    """Run the command line; returns the exit code: 0, 1 for a failed check, 2 for an error, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        # a name that the terminal cannot show must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        code = COMMANDS[options.command](options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("nbnorm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # who reads the output has left; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (OSError, ValueError, TypeError, MemoryError) as error:
        print("nbnorm:", _line(str(error)) or type(error).__name__, file=sys.stderr)
        return 2
    return code


def _line(text):
    """On one line, and with what would steer a terminal, which files may have, spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def parser():
    result = argparse.ArgumentParser(prog="nbnorm", description=DESCRIPTION)
    result.add_argument("--version", action="version", version=__version__)
    commands = result.add_subparsers(dest="command", metavar="COMMAND")
    apply = commands.add_parser("apply", help="layer norm of a .npy file", description="Layer norm of an array on disk.")
    apply.add_argument("input", metavar="INPUT.npy", help="the array, of any size and order; it is only read")
    apply.add_argument("-o", "--output", metavar="OUT.npy", required=True, help="appears when the result is complete")
    apply.add_argument(
        "--normalized-shape", type=_shape, required=True, metavar="N[,N...]", help="sizes of a row, as in 768 or 28,28"
    )
    apply.add_argument("--weight", metavar="W.npy", help="scale of each element of a row")
    apply.add_argument("--bias", metavar="B.npy", help="shift of each element of a row")
    apply.add_argument("--eps", type=float, default=1e-5, help="added to the variance (default: %(default)s)")
    apply.add_argument("--use-diff-of-squares", action="store_true", help="variance as mean(x^2) - mean(x)^2")
    apply.add_argument("--dtype", choices=["float16", "float32", "float64"], help="of the result (default: the input's)")
    warm.add_command(commands, _shape)
    return result


def _shape(text):
    return [int(size) for size in text.split(",")]


def _report(options):
    # imported here, since what `--help` prints needs none of it
    from nbnorm.report import report

    return 0 if report() else 1


def _apply(options):
    from nbnorm.apply import apply

    with _signals() as received:
        applied = apply(
            options.input,
            options.output,
            options.normalized_shape,
            options.weight,
            options.bias,
            options.eps,
            options.use_diff_of_squares,
            options.dtype,
            interrupted=lambda: bool(received),
        )
    print(f"{options.output}: {applied.shape} {applied.dtype}; ", end="")
    print(f"largest error {applied.largest_error:.2f} eps in {applied.checked_rows} rows checked against longdouble")
    return 0


@contextmanager
def _signals():
    """A list of the signals to stop that came: an exception out of their handler could hit Numba amid a compile."""
    received: list[int] = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # one that is ignored stays so, as SIGHUP under nohup
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMANDS = {None: _report, "apply": _apply, "warm": warm.warm}

if __name__ == "__main__":
    sys.exit(main())
