"""The dense FFN against a loop over tokens; the sparse one is in test_moe.py."""

import torch
from reference_layers import swiglu
from torch import nn

from onetrain.model.ffn import SwiGLU


def test_swiglu():
    """Output and gradients of every parameter and of the input."""
    torch.manual_seed(0)
    module = SwiGLU(5, 7).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    parameters = {f"ffn.{name}": p for name, p in module.named_parameters()}
    x_MD = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    wanted = [x_MD, *parameters.values()]
    y_MD, expected_MD = module(x_MD), torch.stack([swiglu(parameters, "ffn", x) for x in x_MD])
    torch.testing.assert_close(y_MD, expected_MD, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(y_MD)
    found = torch.autograd.grad(y_MD, wanted, cotangent)
    for gradient, other in zip(found, torch.autograd.grad(expected_MD, wanted, cotangent), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)
        assert gradient.any()
