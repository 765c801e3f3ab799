"""Algorithms whose contributions add up: their laws, and ranks that run in one process."""

from __future__ import annotations

import pytest
import torch

from tests.compressors import REDUCIBLES
from tests.gradients import awkward_shapes, training_run
from tests.reducible_laws import check_reducible_laws

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
RANKS = 3


def of_ranks(base, noise, seed):
    """Return gradients of several ranks around one."""
    numbers = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(RANKS):
        made.append(
            {
                name: grad + noise * grad.abs().mean() * normal_like(grad, numbers)
                if grad.numel()
                else grad.clone()
                for name, grad in base.items()
            }
        )
    return made


def normal_like(like, numbers):
    return torch.empty_like(like).copy_(torch.randn(like.shape, generator=numbers))


@pytest.mark.parametrize("algorithm", REDUCIBLES, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_laws_hold_on_random_gradients_of_every_shape(algorithm, dtype):
    base = awkward_shapes(dtype, seed=0)
    run = [of_ranks(base, 0.3, seed) for seed in range(3)]
    run.append([{name: -0.5 * grad for name, grad in grads.items()} for grads in run[-1]])
    check_reducible_laws(algorithm, run)


@pytest.mark.parametrize("algorithm", REDUCIBLES, ids=repr)
def test_laws_hold_on_gradients_of_a_training_run(algorithm):
    run = [of_ranks(base, 0.5, seed) for seed, base in enumerate(training_run(8))]
    check_reducible_laws(algorithm, run)
