"""The kernels of bits.py compiled here for a Python on another processor, whose cache on disk they are then in.

There, `cross_compile.py identify` prints what decides which kernels it loads. Here, `compile FILE`, with what was printed,
leaves them in the cache. `compare AHEAD CACHE` fails unless that Python then loaded all but one, and compiled that one to
the same machine code.
"""

import json
import pickle
import platform
import sys
from pathlib import Path

import cpu_targets


def identity():
    """The processor, the versions and the settings that a kernel's file is named by, and Python's bytecode."""
    from numba.core.registry import cpu_target

    from nbnorm.disk.cache import Cache

    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return {
        "target": [triple, platform.machine(), cpu, features],
        "python": sys.version,
        "bytecode": sys.implementation.cache_tag,
        "key": Cache("any kernel", (), None, None).key,
    }


def compile_for(other):
    """Serial builds of what each case calls, and the parallel one of the case that has it."""
    cpu_targets.pretend(cpu_targets.Target(*other["target"]))
    # which is part of a key: releases of one minor version compile alike
    sys.version = other["python"]
    if identity() != other:
        print("** nothing is compiled ahead: the other Python has other versions or settings **", file=sys.stderr)
        return
    import bits
    from nbnorm import ahead
    from nbnorm.cpu import choice

    for case in bits.CASES:
        for kernel, is_parallel in ahead.builds(bits.description(case)):
            if not is_parallel or case == bits.PARALLEL:
                choice.ready(kernel, is_parallel)
                # a fault of saving is silent
                assert choice.is_kept(kernel, is_parallel)


def compare(folder, cache):
    """The files in `cache` are links to those in `folder`, but what was compiled since."""
    kernels = list(cache.iterdir())
    new = [path for path in kernels if path.stat().st_nlink == 1]
    print(f"loaded: {len(kernels) - len(new)} kernels, compiled: {len(new)}")
    (compiled,) = new
    assert machine_code(compiled) == machine_code(folder / compiled.name)


def machine_code(path):
    from nbnorm.disk.cache import CHECKSUM_BYTES

    (_, _, (code, _)), *_ = pickle.loads(path.read_bytes()[CHECKSUM_BYTES:])
    return code


def main(command, *arguments):
    if command == "identify":
        json.dump(identity(), sys.stdout)
    elif command == "compile":
        compile_for(json.loads(Path(*arguments).read_text()))
    else:
        compare(*map(Path, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
