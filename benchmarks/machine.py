"""What a measurement was made on: the processor and the versions, nothing that names the computer."""

import ctypes
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba.core.registry import cpu_target

import nbnorm

PACKAGES = {"numpy": "NumPy", "numba": "numba", "torch": "torch", "onnxruntime": "ONNX Runtime", "jax": "JAX"}


def description(peers):
    """The head of a JSON file of results."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": cpu_model(),
            "logical_cores": os.cpu_count(),
            "cache_bytes": cache_bytes(),
            "instructions": instructions(),
        },
        "versions": versions(peers),
    }


def avx2_alone():
    """The environment in which Numba, torch and XLA do without AVX-512, and what came with or after it."""
    newer = ("avx512", "avx10", "avxvnni", "avxifma", "amx")
    features = get_host_cpu_features().items()
    listed = ",".join(f"{'+' if has and not name.startswith(newer) else '-'}{name}" for name, has in features)
    numbas = {"NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": listed}
    peers = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
    return {**os.environ, **numbas, **peers}


def keep_memory():
    """Let glibc's malloc keep what is freed, for all libraries of the process.

    By default it returns blocks above 32 MiB to the system, and every new one costs page faults: torch 2.13 takes 20 ms for
    (4096, 4096), of which its kernel has 3.5. NumPy asks for huge pages, which makes that cheaper, and ONNX Runtime keeps
    its memory in any case. torch's own `out=` form is a copy, and no way around it.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if not (mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, (1 << 31) - 1)):
        raise SystemExit("--keep-memory needs glibc")


def versions(peers):
    names = {package: name for package, name in PACKAGES.items() if package in ("numpy", "numba") or name in peers}
    installed = {name: importlib.metadata.version(package).partition("+")[0] for package, name in names.items()}
    return {"Python": platform.python_version(), "nbnorm": nbnorm.__version__, **installed}


def cpu_model():
    """The processor's name, and LLVM's for its kind: a virtual machine may tell only the maker."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {get_host_cpu_name()}"


def instructions():
    """The widest instructions that kernels are compiled for, which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may limit."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    names = [name for name, feature in (("AVX-512", "+avx512f"), ("AVX2", "+avx2")) if feature in features]
    return names[0] if names else platform.machine()


def cache_bytes():
    """The L2 and L3 caches of all processors together, as far as Linux tells."""
    units = {"K": 1 << 10, "M": 1 << 20}
    shared = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, cpus = ((cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        except OSError:
            continue
        if level in ("2", "3"):
            shared[f"L{level}", cpus] = int(size[:-1]) * units[size[-1]]
    return {
        name: sum(size for (level, _), size in shared.items() if level == name) for name in sorted({k for k, _ in shared})
    }
