"""Which kernel computes the attention of text rows."""

import torch
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.blocked import blocked_attention
from onetrain.model.ksa.layout import Ranges


def kernel_for(kernel: str, device: torch.device) -> str:
    """`auto` resolved: FlexAttention on a GPU, blocked PyTorch elsewhere."""
    if kernel != "auto":
        return kernel
    return "flex" if device.type == "cuda" else "blocked"


def attention(q_HTK: Tensor, text: KeyValue, summary: KeyValue, ranges: Ranges, kernel: str = "auto") -> Tensor:
    """Every text row attends to its ranges of text and summary rows (G, N, K), in one softmax; returns (H, T, K)."""
    if kernel_for(kernel, q_HTK.device) == "flex" and q_HTK.shape[1] > 0:  # its mask cannot be of no rows
        from onetrain.model.ksa.flex import flex_attention  # imports a compiler

        return flex_attention(q_HTK, text, summary, ranges)[0]
    return blocked_attention(q_HTK, text, summary, ranges)[0]
