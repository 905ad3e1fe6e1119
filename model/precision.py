"""The precision in which scores, logits and losses are computed."""

from torch import Tensor, float64


def wide(x: Tensor) -> Tensor:
    """fp32 at least."""
    return x if x.dtype == float64 else x.float()
