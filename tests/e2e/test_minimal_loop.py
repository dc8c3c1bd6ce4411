"""examples/minimal_loop.py is the product's algorithm: the gradient of a step is the product's, and ln P rises.

The loop lets torch's autograd go through one pass over one row. The product completes a table first, forms the gradient
inside its head with constants known beforehand, and sums over micro-batches. What this does not compare: engines and
optimizers, which are the product's there and torch's here.
"""

from pathlib import Path

import pytest
import torch

from examples import minimal_loop
from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.seeds import stream
from megatron_jq.train.passes import BatchOptions
from tests.distributed.cases import NUM_RATIONALES, SMALL, Q, batch, build_options, score_and_train
from tests.distributed.ranks import run_apart, run_ranks


def both_gradients(runtime, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the loop's, the product's) gradient of one step by parameter, from the same weights and rationales."""
    minimal_loop.M = NUM_RATIONALES
    options = build_options(SMALL)
    [policy], [trained] = (build_policies(SMALL, options, runtime) for _ in range(2))
    with runtime.native():
        log_z_BM, log_w_BM = minimal_loop.log_likelihoods(policy, batch())
        if name == "paft":
            coefficients = minimal_loop.paft(log_w_BM, Q, stream("PAFT's draws", 5, 0))
        else:
            coefficients = minimal_loop.garl(log_w_BM, Q)
        minimal_loop.surrogate_loss(coefficients, log_z_BM, log_w_BM).backward()
    model = wrap_for_training([trained], options, runtime)
    score_and_train(runtime, trained, model, batch(), BatchOptions(micro_batch_size=4), name)
    loop = {key: parameter.grad.clone() for key, parameter in policy.named_parameters()}
    return loop, {key: parameter.main_grad.clone() for key, parameter in trained.named_parameters()}


@pytest.mark.parametrize("name", ["garl", "paft"])
def test_the_gradient_of_a_step_is_the_products(name):
    [(loop, product)] = run_ranks(both_gradients, name)
    assert loop.keys() == product.keys() and any(gradient.abs().max() > 0 for gradient in product.values())
    for key, gradient in product.items():
        assert torch.allclose(loop[key], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item()), key


@pytest.mark.parametrize("use_paft", [False, True], ids=["garl", "paft"])
def test_ln_p_rises(use_paft, tmp_path):
    log_p = run_apart(ln_p_of_a_run, use_paft, tmp_path)
    assert log_p[-1] > log_p[0] + 8, log_p


def ln_p_of_a_run(use_paft: bool, folder: Path) -> list[float]:
    return list(minimal_loop.train(10, 0.75, use_paft, folder))
