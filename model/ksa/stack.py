"""A stack of summary attention over packed histories (KSA, sections 2.5 and 2.6).

Legend: T text rows of a part, R summary rows, A = T + R, S summaries per chunk, D width, P rows asked for.
"""

import math

import torch
from torch import Tensor, nn

from onetrain.model.ffn import SwiGLU
from onetrain.model.ksa.attention import KSAAttention
from onetrain.model.ksa.layout import Layout
from onetrain.model.ksa.part import Part, Sequence
from onetrain.model.options import KSAOptions


class KSABlock(nn.Module):
    """Pre-norm attention and FFN, each with a residual, on text and summary rows alike."""

    def __init__(self, options: KSAOptions, full: bool, norm_eps: float) -> None:
        super().__init__()
        self.bypass = full and options.bypass_full
        self.attention_norm = nn.RMSNorm(options.width, eps=norm_eps)
        self.attention = KSAAttention(options, full, norm_eps)
        self.ffn_norm = nn.RMSNorm(options.width, eps=norm_eps)
        self.ffn = SwiGLU(options.width, options.ffn_width)

    def forward(self, x_AD: Tensor, part: Part, sequence: Sequence) -> Tensor:
        """Rows [text; summaries] of the part; same shape."""
        if not self.bypass:
            return self._layer(x_AD, part, sequence)
        text_TD = self._layer(x_AD[: part.n_text], part, sequence)
        return torch.cat((text_TD, x_AD[part.n_text :]))

    def _layer(self, x_AD: Tensor, part: Part, sequence: Sequence) -> Tensor:
        x_AD = x_AD + self.attention(self.attention_norm(x_AD), part, sequence)
        return x_AD + self.ffn(self.ffn_norm(x_AD))


class KSAStack(nn.Module):
    """Blocks over text and summary tokens; `layers` says which have summary attention and which are full."""

    def __init__(self, options: KSAOptions, norm_eps: float) -> None:
        super().__init__()
        self.options = options
        self.summary = nn.Embedding(options.summaries, options.width) if options.summaries else None
        self.blocks = nn.ModuleList(KSABlock(options, kind == "full", norm_eps) for kind in options.layers)
        self.sequence = Sequence()

    def layout(self, lengths: list[int], device: torch.device) -> Layout:
        """Histories of these lengths in this stack's chunks."""
        return Layout.of(lengths, self.options.chunk, self.options.summaries, device)

    def forward(self, x_TD: Tensor, part: Part, rows_P: Tensor) -> Tensor:
        """Text tokens of the part to the states (P, D) of rows of [all text; all summaries] of the whole layout."""
        x_AD = torch.cat((x_TD, self.summary_tokens(part).to(x_TD.dtype)))
        for block in self.blocks:
            x_AD = block(x_AD, part, self.sequence)
        return self.sequence.states(x_AD, part, rows_P)

    def summary_tokens(self, part: Part) -> Tensor:
        """The summary tokens of the part before the first block, (R, D)."""
        if self.summary is None or part.layout.summaries == 0:
            return torch.empty(0, self.options.width, device=part.layout.device)
        return self.summary.weight.repeat(part.n_summaries // self.options.summaries, 1)

    @torch.no_grad()
    def reset_residuals(self, std: float) -> None:
        """Projections onto the residual stream start smaller, by 1/sqrt(2 * layers) (assumption)."""
        for name, parameter in self.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * len(self.blocks)))
