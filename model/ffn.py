"""Feed-forward networks of the blocks: dense SwiGLU, and sparse experts.

Legend: M tokens (any leading shape), D width, E routed experts, W hidden width of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.options import ModelOptions


class SwiGLU(nn.Module):
    """FFN(x) = (silu(x W_gate) * x W_up) W_down; 4 * d_model wide in every published size (OneRec-V2, section 2.4)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SparseFFN(nn.Module):
    """Each token runs through its top-k experts and through the shared ones (DeepSeek-V3 routing).

    The readable single-device form: a loop over experts, without load balancing.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options.moe
        d, experts, width = options.d_model, options.moe.experts, options.expert_width
        self.router = nn.Linear(d, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, d))
        self.down = nn.Parameter(torch.empty(experts, d, width))
        self.shared = SwiGLU(d, options.moe.shared * width) if options.moe.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        x_MD = x.reshape(-1, x.shape[-1])
        y_MD = torch.zeros_like(x_MD) if self.shared is None else self.shared(x_MD)
        weight_MK, expert_MK = self.route(x_MD)
        for expert in range(self.options.experts):
            token, choice = (expert_MK == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x_MD[token], self.gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, self.down[expert])
            y_MD = y_MD.index_add(0, token, out * weight_MK[token, choice, None])
        return y_MD.view_as(x)

    def route(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (M, k) and indices (M, k) of every token's experts; scores in fp32 at least."""
        score_ME = self.router(x_MD)
        score_ME = score_ME if score_ME.dtype == torch.float64 else score_ME.float()
        score_ME = score_ME.sigmoid() if self.options.score == "sigmoid" else score_ME.softmax(-1)
        weight_MK, expert_MK = score_ME.topk(self.options.top_k, dim=-1)
        if self.options.renormalise:
            weight_MK = weight_MK / weight_MK.sum(-1, keepdim=True)
        return weight_MK.to(x_MD.dtype), expert_MK
