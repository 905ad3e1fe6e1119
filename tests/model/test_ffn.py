"""Dense and sparse FFNs against loops over tokens and experts."""

import pytest
import torch
from reference_layers import experts, swiglu
from torch import nn

from onetrain.model.ffn import SwiGLU
from onetrain.model.moe import SparseFFN
from onetrain.model.options import ModelOptions, MoEOptions


def random_module(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def check(module, reference, x_MD, routes=False):
    """Output and gradients of every parameter and of the input."""
    parameters = {f"ffn.{name}": p for name, p in module.named_parameters()}
    wanted = [x_MD.requires_grad_(), *parameters.values()]
    y_MD = module(x_MD)
    expected_MD = torch.stack([reference(parameters, x) for x in x_MD])
    torch.testing.assert_close(y_MD, expected_MD, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(y_MD)
    found = torch.autograd.grad(y_MD, wanted, cotangent)
    for gradient, other in zip(found, torch.autograd.grad(expected_MD, wanted, cotangent), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)
        assert gradient.any()


def test_swiglu():
    check(random_module(SwiGLU(5, 7)), lambda p, x: swiglu(p, "ffn", x), torch.randn(3, 5, dtype=torch.float64))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("number", "top_k", "shared"), [(4, 2, 0), (5, 3, 2), (3, 1, 1), (2, 2, 0)])
def test_experts(score, renormalise, number, top_k, shared):
    moe = MoEOptions(number, top_k, shared, d_expert=3, score=score, renormalise=renormalise)
    module = random_module(SparseFFN(ModelOptions(d_model=8, n_heads=2, moe=moe)))
    x_MD = torch.randn(9, 8, dtype=torch.float64)
    if top_k == 1 and renormalise:  # the weight is always 1, so the router has no gradient
        module.router.requires_grad_(False)
        parameters = {f"ffn.{name}": p for name, p in module.named_parameters()}
        expected_MD = torch.stack([experts(parameters, "ffn", x, moe) for x in x_MD])
        torch.testing.assert_close(module(x_MD), expected_MD, rtol=1e-9, atol=1e-10)
        return
    check(module, lambda p, x: experts(p, "ffn", x, moe), x_MD)
    batched = module(x_MD.view(3, 3, 8))
    torch.testing.assert_close(batched.view(9, 8), module(x_MD), rtol=1e-12, atol=1e-12)


def test_a_token_runs_through_its_own_experts_only():
    """Spoiling an expert changes exactly the tokens that chose it."""
    moe = MoEOptions(experts=5, top_k=2, d_expert=3)
    module = random_module(SparseFFN(ModelOptions(d_model=8, n_heads=2, moe=moe)))
    x_MD = torch.randn(30, 8, dtype=torch.float64)
    with torch.no_grad():
        before_MD = module(x_MD)
        chosen_ME = torch.zeros(30, 5, dtype=torch.bool)
        for token, x in enumerate(x_MD):
            chosen_ME[token, torch.stack([(row * x).sum() for row in module.router.weight]).argsort()[-2:]] = True
        for expert in range(5):
            kept = module.down[expert].clone()
            module.down[expert] += 1.0
            changed_M = (module(x_MD) - before_MD).abs().amax(1) > 1e-9
            assert torch.equal(changed_M, chosen_ME[:, expert])
            assert changed_M.any()
            assert not changed_M.all()
            module.down[expert] = kept
