"""Do the examples in docstrings come out as they say, in the package that is imported, installed or not?"""

import doctest
import importlib
from pathlib import Path

import pytest

import nbnorm
from nbnorm.calls import checks

PACKAGE = Path(nbnorm.__file__).parent
MODULES = [
    ".".join(["nbnorm", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "nbnorm.cuda.device" and not checks.has_numba_cuda():
        pytest.skip("needs numba-cuda")
    if name.startswith("nbnorm.torch"):
        pytest.importorskip("torch")
    if name.startswith("nbnorm.jax"):
        pytest.importorskip("jax")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
