"""The command line: `nbnorm`, also `python -m nbnorm`."""

import argparse
import io
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress

from nbnorm import __version__
from nbnorm.commands import warm

DESCRIPTION = "Layer norm as Numba-compiled kernels."


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
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # who reads the output has left; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (OSError, ValueError, TypeError, MemoryError) as error:
        _complain(_line(str(error)) or type(error).__name__)
        return 2
    return code


def _complain(text):
    # where there is no stderr, print would take stdout; one that cannot be written to leaves the exit code to tell
    if sys.stderr is not None:
        with suppress(OSError):
            print("nbnorm:", text, file=sys.stderr, flush=True)


def _line(text):
    return _spelt_out(" ".join(text.split()))


def _spelt_out(text):
    """With what would steer a terminal, which files and their names may have, spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def parser():
    result = argparse.ArgumentParser(prog="nbnorm", description=DESCRIPTION)
    result.add_argument("--version", action="version", version=__version__)
    commands = result.add_subparsers(dest="command", metavar="COMMAND")
    help_ = "what this machine offers, checked and timed"
    description = "Check both passes on real-sized arrays against float64, and time them beside NumPy and a copy."
    commands.add_parser("check", help=help_, description=description)
    _add_apply(commands)
    help_ = "the folder of compiled kernels"
    cache = commands.add_parser("cache", help=help_, description=f"Show {help_}: where it is, and what is in it.")
    cache.add_argument("--clear", action="store_true", help="delete them")
    warm.add_command(commands, _shape)
    return result


def _add_apply(commands):
    description = (
        "Layer norm, or RMS norm, of an array on disk. Files are .npy, .npz, safetensors, HDF5 and zarr; where one has "
        "several arrays, FILE:NAME is one of them."
    )
    apply = commands.add_parser("apply", help="layer norm of an array in a file", description=description)
    apply.add_argument("input", metavar="INPUT", help="the array, of any size and order; it is only read")
    help_ = "appears when the result is complete, of the kind that its name says, .npy for any other name"
    apply.add_argument("-o", "--output", metavar="OUT", required=True, help=help_)
    apply.add_argument(
        "--normalized-shape", type=_shape, required=True, metavar="N[,N...]", help="sizes of a row, as in 768 or 28,28"
    )
    help_ = "where they are, as in 1 for channels in images; from the back: --axis=-2 (default: the last ones)"
    apply.add_argument("--axis", type=_axes, metavar="A[,A...]", help=help_)
    apply.add_argument("--weight", metavar="FILE", help="scale of each element of a row")
    apply.add_argument("--bias", metavar="FILE", help="shift of each element of a row")
    help_ = "added to the variance (default: 1e-5, with --rms as torch.nn.RMSNorm has it)"
    apply.add_argument("--eps", type=float, help=help_)
    apply.add_argument("--use-diff-of-squares", action="store_true", help="variance as mean(x^2) - mean(x)^2")
    apply.add_argument("--rms", action="store_true", help="RMS norm, which has no bias")
    apply.add_argument("--residual", metavar="FILE", help="added to the array, before the norm")
    apply.add_argument("--total-out", metavar="OUT", help="the sum of the array and the residual, to keep it too")
    dtypes = ["float16", "bfloat16", "float32", "float64"]
    apply.add_argument("--dtype", choices=dtypes, help="of the result (default: the input's)")
    help_ = "a Dask cluster's, as in tcp://10.0.0.1:8786: its workers, who see the same files, do the work"
    apply.add_argument("--scheduler", metavar="ADDRESS", help=help_)


def _shape(text):
    return _numbers(text, "the sizes of a row, as in 768 or 28,28")


def _axes(text):
    return _numbers(text, "the axes of a row, as in 1 or 1,2")


def _numbers(text, expected):
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60}; expected {expected}") from None


def _help(_):
    parser().print_help()
    return 0


def _check(_):
    # imported here, since what `--help` prints needs none of it
    from nbnorm.commands.report import report

    return 0 if report() else 1


def _apply(options):
    from nbnorm.calls.problem import ForwardCall
    from nbnorm.commands.apply import apply

    fault = _apply_fault(options)
    if fault:
        raise ValueError(fault)
    default_eps = None if options.rms else 1e-5
    call = ForwardCall(
        options.input, options.normalized_shape, options.weight, options.bias,
        default_eps if options.eps is None else options.eps, options.use_diff_of_squares, out=options.output,
        residual=options.residual, total_out=options.total_out or False, is_rms=options.rms,
        is_added=options.residual is not None, axis=options.axis,
    )  # fmt: skip
    with _signals() as received:
        applied = apply(call, options.dtype, options.scheduler, interrupted=lambda: bool(received))
    for path in applied.taken_as_bfloat16:
        print(f"{_spelt_out(path)}: 2-byte elements without a name, taken as bfloat16")
    print(f"{_spelt_out(options.output)}: {applied.shape} {applied.dtype}; ", end="")
    print(f"largest error {applied.largest_error:.2f} eps in {applied.checked_rows} rows checked against longdouble")
    return 0


def _apply_fault(options):
    """What is wrong with options of `apply` together."""
    for name, value in (("--bias", options.bias), ("--use-diff-of-squares", options.use_diff_of_squares)):
        if options.rms and value:
            return f"{name}: RMS norm has none; expected it without --rms"
    if options.total_out is not None and options.residual is None:
        return f"--total-out: {options.total_out}; expected --residual beside it, as there is no sum without"
    if options.scheduler is not None and not re.fullmatch(r"(tcp|tls)://.+:[0-9]{1,5}", options.scheduler):
        return f"--scheduler: {options.scheduler}; expected the address of a Dask scheduler, as in tcp://10.0.0.1:8786"
    return ""


def _cache(options):
    from nbnorm.disk import cache_folder

    folder, distrust = cache_folder.place()
    print(f"folder:  {_spelt_out(folder)}")
    reason = distrust or cache_folder.fault_of_writing(folder)
    if reason:
        consequence = "each process compiles its kernels" if distrust else "no kernel is added"
        print(f"fault:   {_spelt_out(reason)}: {consequence}; NBNORM_CACHE_DIR names another folder")
    if distrust:
        return 0
    kernels, unfinished = cache_folder.files(folder)
    megabytes = sum(status.st_size for _, status in kernels) / 1e6
    print(f"kernels: {len(kernels)}, {megabytes:.1f} MB of at most {cache_folder.LIMIT_BYTES / 1e6:.0f} MB")
    if kernels:
        used = [time.strftime("%Y-%m-%d", time.localtime(status.st_mtime)) for _, status in kernels]
        print(f"used:    {min(used)} to {max(used)}")
    if options.clear:
        for path, _ in kernels + unfinished:
            path.unlink(missing_ok=True)
        print(f"cleared: {len(kernels)} kernels deleted")
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


COMMANDS = {None: _help, "check": _check, "apply": _apply, "cache": _cache, "warm": warm.warm}

if __name__ == "__main__":
    sys.exit(main())
