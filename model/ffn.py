"""The dense feed-forward network of the blocks; sparse experts are in moe.py."""

from torch import Tensor, nn
from torch.nn import functional as F


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
