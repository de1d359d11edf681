"""The CPU kernels compiled for processors that are not here: `python tests/cpu_targets.py NAME` prints what their code has.

It is Numba's own way from Python to assembly, for another processor. Only what would load and run the code is left out.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm

LINUX_X86, LINUX_ARM, MACOS_ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-darwin"


class Target(NamedTuple):
    """What the system, the processor and its features are called where Numba asks, and what Python says of the machine."""

    triple: str
    machine: str
    cpu: str
    features: str


# the features beside those that LLVM knows a processor to have: of x86-64 what `processor` asks for, of ARM on Linux what
# LLVM reads there in /proc/cpuinfo, of macOS nothing, as there
TARGETS = {
    "znver3": Target(LINUX_X86, "x86_64", "znver3", "+avx,+f16c,+ssse3"),
    "skylake-avx512": Target(LINUX_X86, "x86_64", "skylake-avx512", "+avx,+avx512bw,+f16c,+ssse3"),
    "neoverse-v1": Target(LINUX_ARM, "aarch64", "neoverse-v1", "+aes,+crc,+fp-armv8,+lse,+neon,+rand,+sha2,+sha3,+sm4,+sve"),
    "apple-m1": Target(MACOS_ARM, "arm64", "apple-m1", ""),
}
DTYPES = "float32", "bfloat16", "float16"
# a length of each kind of rows
ROWS = {"short": 64, "ordinary": 768, "long": 1 << 17}
# of those over an axis that is not the last, which differ from the others in what each dtype has in common
CHANNELS, CHANNELS_DTYPES = 96, DTYPES[:2]


def counts_for(name):
    """Those of each kernel, in a process of its own."""
    import nbnorm

    environment = os.environ | {"PYTHONPATH": str(Path(nbnorm.__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True, check=False)
    # LLVM only says so where it does not know a processor or a feature
    if done.returncode or "is not a recognized" in done.stderr:
        raise RuntimeError(f"{name}: {done.stderr}")
    return json.loads(done.stdout)


def recorded(found):
    """Of what was found, the numbers that are to stay as they are, as the page shows them."""
    return {title: "{lane_branches}, {spills} + {reloads}".format(**counts) for title, counts in found.items()}


def compiled_by():
    """What decides about the code beside the sources and the processor."""
    import llvmlite
    import numba

    return f"Python {sys.version_info[0]}.{sys.version_info[1]}, Numba {numba.__version__}, llvmlite {llvmlite.__version__}"


def pretend(target):
    """Have Numba compile for that processor. Before it, and nbnorm, are imported."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = llvm.get_default_triple = lambda: target.triple
    llvm.Target.from_default_triple = classmethod(lambda cls: cls.from_triple(target.triple))
    platform.machine = lambda: target.machine
    os.environ |= {"NUMBA_CPU_NAME": target.cpu, "NUMBA_CPU_FEATURES": target.features}
    from numba.core import codegen

    codegen.JITCodeLibrary._finalize_specific = lambda library: None
    codegen.JITCodeLibrary.get_pointer_to_function = lambda library, name: library._ensure_finalized() or 0
    codegen.JITCPUCodegen.set_env = lambda codegen, name, environment: None
    # for the cache on disk, which otherwise gets what LLVM has made to load it
    codegen.JITCodeLibrary._get_compiled_object = lambda library: library.codegen._tm.emit_object(library._final_module)


def kernels():
    """Serial builds, with weight and bias, and of all gradients, with x's dtype for all."""
    from nbnorm import ahead
    from nbnorm.calls.problem import Description

    calls = [(rows, Description(dtype, cols, dtype, dtype)) for rows, cols in ROWS.items() for dtype in DTYPES]
    calls += [("channels-first", Description(dtype, CHANNELS, dtype, dtype, axis=1)) for dtype in CHANNELS_DTYPES]
    for rows, described in calls:
        for kernel, is_parallel in ahead.builds(described):
            if not is_parallel:
                yield f"{kernel.name} {rows} {described.x}", kernel


def build(kernel):
    """The serial build, compiled now, and not kept: what is on disk has no assembly, and what is made here may not run."""
    from nbnorm.cpu import choice
    from nbnorm.disk.cache import Cache

    Cache.load_overload = Cache.save_overload = lambda *arguments: None
    (built,) = choice.ready(kernel, False).overloads.values()
    return built


def assembly_of(library):
    """With LLVM's comments."""
    machine = library.codegen._tm
    machine.set_asm_verbosity(True)
    return machine.emit_assembly(library._final_module)


def main(name):
    pretend(TARGETS[name])
    import assembly

    found = {}
    for title, kernel in kernels():
        built = build(kernel)
        counts = assembly.counts(assembly_of(built.library), built.fndesc.llvm_func_name)
        found[title] = counts._asdict()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
