#!/usr/bin/env bash
# torch 2.13.0: the third derivative of torch.nn.functional.layer_norm is wrong, without a word. For float64 rows of five it is 40 % off
# finite differences, and the fourth is off by as much as it is large. The first and second are right to 1e-9, as are all four of the
# same formula written out in torch's operations, and those of torch.nn.functional.rms_norm.
#
# Guess: a derivative that torch has formulas for is right at any order, or an error says that it stops.
# Seen: the formula of the second derivative takes the mean and rstd that forward has kept as constants, which is right once, and
# autograd goes on through it. `torch.autograd.gradgradcheck`, which looks at the second, passes. (torch's issue 175754; its pull
# request 176234 makes it an error.)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

cat > "$folder/derivatives.py" <<'PYTHON'
import torch
import torch.nn.functional as F

COLS, EPS, STEP = 5, 1e-5, 1e-6


def written_out(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()


def layer_norm(x):
    return F.layer_norm(x, (COLS,), eps=EPS)


def rms_norm(x):
    return F.rms_norm(x, (COLS,), eps=EPS)


def derivatives(norm, x, order):
    """Of a sum of cubes, then each of the squared size of the one before."""
    x = x.detach().requires_grad_()
    value, found = norm(x).pow(3).sum(), []
    for _ in range(order):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(gradient.detach())
        value = gradient.square().sum()
    return found


def by_differences(norm, x, order):
    """The same one from differences of the one before."""
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = STEP
        above, below = (derivatives(norm, moved, order - 1)[-1].square().sum() for moved in (x + step, x - step))
        found.view(-1)[i] = (above - below) / (2 * STEP)
    return found


x = torch.randn(3, COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
for norm in (written_out, layer_norm, rms_norm):
    errors = []
    for order, found in enumerate(derivatives(norm, x, 4), 1):
        expected = by_differences(norm, x, order) if order > 1 else found
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    print(norm.__name__, "off by", *(f"{error:.1e}" for error in errors))
    assert max(errors[:2]) < 1e-6
    if norm is layer_norm:
        assert torch.autograd.gradgradcheck(norm, (x.requires_grad_(),))
        x = x.detach()
        assert min(errors[2:]) > 0.1, "seen before: the third and fourth are wrong"
    else:
        assert max(errors) < 1e-5
PYTHON
"$folder/venv/bin/python" "$folder/derivatives.py"
