"""What a weight should be on inputs that rounding the layers before has moved.

Rounded as if its inputs were exact, each layer passes on what those before it got wrong, and adds
to it. A weight that is fitted to the inputs it gets, so that it answers as the exact one did to the
exact inputs, takes part of that back (Li et al. 2025, GPTAQ; Arai & Ichikawa 2025, QEP). So does
one whose answer is added to the stream of states, if it adds what is missing there.

The fit is a ridge regression on second moments, and a strong one: with a fiftieth of this ridge the
layers' errors were smaller still, and models learned worse on them (docs/LOG.md, the fifth round).
Half of the texts tell how much of the correction holds for texts that it was not made from, and
that much of it is taken.
"""

from __future__ import annotations

import torch

RIDGE = 5.0
"""How many times its own size is added to each second moment."""
LEAST = 1e-3
"""Part of their mean that each is taken for at least."""


def corrected(weight: torch.Tensor, inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) for the inputs that come, float32.

    Args:
        weight: (out, in) float32.
        inputs: XᵀX (2, in, in) float32 of the inputs that come, of both halves of the texts.
        wanted: RᵀX (2, out, in), where R (N, out) is what the answers should be besides.
    """
    probe = _solve(inputs[0], wanted[0])
    # least squares on the other half: how many times this correction would be best there
    explained = ((probe @ inputs[1]) * probe).sum()
    strength = (wanted[1] * probe).sum() / explained.clamp(min=1e-30)
    whole = _solve(inputs.sum(0), wanted.sum(0))
    return weight + strength.clamp(0, 1) * whole


def _solve(moments: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """C (out, in) with C moments ≈ wanted; the ridge keeps it where the inputs say little."""
    diagonal = moments.diagonal()
    least = LEAST * diagonal.mean().clamp(min=1e-30)
    damped = moments + torch.diag(RIDGE * diagonal + least)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.zeros_like(wanted)
    return torch.cholesky_solve(wanted.t(), lower).t()
