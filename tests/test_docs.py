"""Does what the README and the documentation show run, and come out as they say?"""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbnorm
from nbnorm.commands import report
from pages import links, pages, program, programs

PROGRAMS = programs()


def marks(program):
    return [pytest.mark.hardware, pytest.mark.device] if program.needs_device else []


def run(program, names):
    for block in program.blocks:
        if block.language == "python":
            exec(compile(block.code, str(program), "exec"), names)
        elif block.language == "pycon":
            compare(block.code, names, program)
        else:
            assert block.language == "bash", f"{block.language}: neither run nor one of those that are not"
            # where the package is not installed, there is no command of this name
            function = f'nbnorm() {{ "{sys.executable}" -m nbnorm "$@"; }}\n'
            environment = os.environ | {"PYTHONPATH": str(Path(nbnorm.__file__).parent.parent)}
            subprocess.run(["bash", "-euc", function + block.code], env=environment, check=True)


def compare(session, names, program):
    """What an interactive session shows, with what comes."""
    examples = doctest.DocTestParser().get_doctest(session, names, str(program), None, 0)
    assert examples.examples
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=report.append, clear_globs=False)
    assert not report, "".join(report)


@pytest.mark.compiled
@pytest.mark.parametrize("program", [pytest.param(p, id=str(p), marks=marks(p)) for p in PROGRAMS if not p.missing()])
def test_programs(program, tmp_path, monkeypatch):
    if program.needs_device and (fault := report.cuda_fault()):
        pytest.skip(f"needs a CUDA device: {fault}")
    if any(block.language == "bash" for block in program.blocks) and shutil.which("bash") is None:
        pytest.skip("needs bash")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    # as NumPy is for a reader
    with np.errstate(under="ignore"):
        run(program, names)
    CLAIMS.get(str(program), lambda names: None)(names)


def the_readmes_gradients(names):
    assert names["grads"].dx.shape == names["x"].shape
    assert names["grads"].dweight is None


def digits_are_read(names):
    """The figures of the text, with room for another machine's rounding."""
    assert names["right"] > 0.95
    assert 1.5 < names["losses"][0] < 3.5
    last = {curve: np.mean(losses[-20:]) for curve, losses in names["curves"].items()}
    for rate in names["rates"]:
        assert last["with layer norm", rate] < 0.1
    assert last["without", 0.03] < last["with layer norm", 0.03]
    assert last["without", 0.3] == pytest.approx(np.log(10), abs=0.05)


def gradients_of_blocks(names):
    """Both kinds of halves, against central differences in float64."""
    rng = np.random.default_rng(0)
    for half in (names["PreLN"], names["PostLN"]):
        for f in (names["Attention"], names["FeedForward"]):
            layer = half(f(8, rng), 8)
            for owner in (layer.f, layer.ln):
                arrays = {name: value for name, value in vars(owner).items() if isinstance(value, np.ndarray)}
                vars(owner).update({name: array.astype(np.float64) for name, array in arrays.items()})
            x, dy = rng.standard_normal((2, 2, 3, 8))
            _, kept = layer.forward(x)
            dx, grads = layer.backward(dy, kept)
            for array, grad in zip([x, *layer.parameters()], [dx, *grads], strict=True):
                place = np.unravel_index(np.abs(grad).argmax(), grad.shape)
                before, step = array[place], 1e-5
                sides = []
                for sign in (1, -1):
                    array[place] = before + sign * step
                    sides.append((layer.forward(x)[0] * dy).sum())
                array[place] = before
                assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(grad[place], rel=1e-6)


def numbas_layer_has_learned(names):
    wanted = names["wanted"].copy_to_host()
    for parameter in (names["ln"].weight, names["ln"].bias):
        np.testing.assert_allclose(parameter.copy_to_host(), wanted, atol=1e-3)


def cupys_weight_has_changed(names):
    assert (names["weight"] != 1).all().item()


def the_model_learns_the_same(names):
    """The figures of the text, with room for another machine's rounding."""
    for dtype in {dtype for dtype, _ in names["curves"]}:
        theirs, ours = (np.array(names["curves"][dtype, with_nbnorm]) for with_nbnorm in (False, True))
        assert 4 < ours[0] < 5.5
        assert ours[-20:].mean() < 2.7
        assert np.abs(ours - theirs).max() < 0.1


def jaxs_gradients_are_those_of_the_formula(names):
    jax, jnp = names["jax"], names["jnp"]

    def layer_norm(x, weight, bias):
        return nbnorm.jax.layer_norm(x, 512, weight, bias)

    def formula(x, weight, bias):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias

    operands = names["x"], jnp.linspace(0.5, 2, 512), jnp.linspace(-1, 1, 512)

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.square(f(*a) - 1).mean(), argnums=(0, 1, 2)))(*operands)

    own, expected = gradients(layer_norm), gradients(formula)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), own, expected)
    rows = jax.vmap(layer_norm, in_axes=(0, None, None))(*operands)
    np.testing.assert_allclose(rows, formula(*operands), rtol=1e-4, atol=1e-5)


def dasks_results_are_those_of_the_whole(names):
    x, weight, bias = (np.asarray(names[name]) for name in ("x", "weight", "bias"))
    y = nbnorm.layer_norm(x, 512, weight, bias)
    np.testing.assert_array_equal(names["y"].compute(), y, strict=True)
    dx, dweight, dbias = nbnorm.layer_norm_backward(y / y.size, x, 512, weight)
    np.testing.assert_array_equal(names["dx"].compute(), dx, strict=True)
    np.testing.assert_allclose(names["dweight"], dweight, rtol=1e-6, strict=True)
    np.testing.assert_allclose(names["dbias"], dbias, rtol=1e-4, atol=1e-9, strict=True)


def xarrays_result_is_that_of_a_view(names):
    x, weight = names["x"], names["weight"]
    expected = np.moveaxis(nbnorm.layer_norm(np.moveaxis(x.values, 1, -1), 64, weight.values), -1, 1)
    np.testing.assert_array_equal(names["y"].values, expected, strict=True)


# what a page says of its program, but does not test itself
CLAIMS = {
    "README.md: the beginning": the_readmes_gradients,
    "docs/tutorial.md: The data": digits_are_read,
    "docs/character-model.md: The text": the_model_learns_the_same,
    "docs/howto/jax.md: A function and its gradients": jaxs_gradients_are_those_of_the_formula,
    "docs/howto/dask.md: the beginning": dasks_results_are_those_of_the_whole,
    "docs/howto/elsewhere.md: xarray": xarrays_result_is_that_of_a_view,
    "docs/howto/transformer.md: The two residual halves": gradients_of_blocks,
    "docs/training.md: Numba's arrays on a GPU": numbas_layer_has_learned,
    "docs/training.md: CuPy's arrays on a GPU": cupys_weight_has_changed,
}


def test_every_claim_has_its_program():
    assert set(CLAIMS) <= set(map(str, PROGRAMS))
    assert len(set(map(str, PROGRAMS))) == len(PROGRAMS)


def test_every_block_says_what_it_is():
    for page in pages():
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert not any(fences[1::2]), page
        assert all(re.fullmatch(r"python|pycon|bash|sh|text|\{\S+\}( \S+)?", fence) for fence in fences[::2]), page


def test_links_of_pages_lead_to_files():
    """Read where they lie; Sphinx checks them for the site, with the places within pages."""
    found = [(page, link) for page in pages() for link in links(page)]
    assert len(found) > 20
    assert [(page.name, link) for page, link in found if not (page.parent / link).exists()] == []


@pytest.mark.compiled
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a way to run on one core")
def test_jaxs_program_on_one_core(python_environment):
    """A callback hung where JAX had one thread, and dispatched to it; a handler needs nothing of JAX."""
    pytest.importorskip("jax")
    code = program("docs/howto/jax.md", "A function and its gradients").python.replace("512", "1024")
    one_core = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    more = """
loss_of_product = jax.jit(jax.value_and_grad(lambda x, weight, bias: loss(jnp.tanh(x @ x.T), weight, bias)))
for i in range(4):
    x = jax.random.normal(jax.random.key(i), (1024, 1024))
    jax.block_until_ready(loss_of_product(x, jnp.ones(1024), jnp.zeros(1024)))
"""
    subprocess.run([sys.executable, "-c", one_core + code + more], env=python_environment, check=True, timeout=300)
