"""The dense OneRec-V2 lazy decoder (arXiv 2508.20900, section 2).

The context is turned into key/value sets once; only [BOS, s1, ..., s_{L-1}] of each target runs through the blocks.

Legend: B context rows, P context positions (one static + N events), T target slots per row, M targets that count,
S tokens per target, Q query tokens per row, L SID levels, D width, V codes per level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.attention import CrossAttention, KeyValue, SelfAttention
from onetrain.model.context import ContextProcessor
from onetrain.model.inputs import Context, Targets
from onetrain.model.options import ModelOptions, Vocabulary


@dataclass(frozen=True)
class TargetLayout:
    """Where M targets sit among B rows of T slots, so that only cross-attention ever sees padding slots."""

    rows: int  # B
    slots: int  # T
    index_M: Tensor | None  # flat slot b * T + t of each target; None = every slot is a target

    def to_rows(self, x_MSD: Tensor) -> Tensor:
        """(M, S, D) to (B, T * S, D); padding slots are zero."""
        if self.index_M is None:
            return x_MSD.reshape(self.rows, -1, x_MSD.shape[-1])
        slots = x_MSD.new_zeros(self.rows * self.slots, *x_MSD.shape[1:]).index_copy(0, self.index_M, x_MSD)
        return slots.reshape(self.rows, -1, x_MSD.shape[-1])

    def from_rows(self, x_BQD: Tensor) -> Tensor:
        """(B, T * S, D) to (M, S, D)."""
        slots = x_BQD.reshape(self.rows * self.slots, -1, x_BQD.shape[-1])
        return slots if self.index_M is None else slots.index_select(0, self.index_M)


class SwiGLU(nn.Module):
    """FFN(x) = (silu(x W_gate) * x W_up) W_down; 4 * d_model wide in every published size (section 2.4)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm cross-attention, causal self-attention and FFN, each with a residual (section 2.3)."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        d_model = options.d_model
        self.cross_norm = nn.RMSNorm(d_model, eps=options.norm_eps)
        self.cross = CrossAttention(d_model, options.n_heads)
        self.self_norm = nn.RMSNorm(d_model, eps=options.norm_eps)
        self.self_attention = SelfAttention(d_model, options.n_heads)
        self.ffn_norm = nn.RMSNorm(d_model, eps=options.norm_eps)
        self.ffn = SwiGLU(d_model, options.ffn_width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self, h_MSD: Tensor, kv: KeyValue, mask_BQP: Tensor, layout: TargetLayout, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Returns the new hidden states (M, S, D) and the self-attention keys and values so far."""
        cross_BQD = self.cross(layout.to_rows(self.cross_norm(h_MSD)), kv, mask_BQP)
        h_MSD = h_MSD + self.dropout(layout.from_rows(cross_BQD))
        self_MSD, present = self.self_attention(self.self_norm(h_MSD), past)
        h_MSD = h_MSD + self.dropout(self_MSD)
        return h_MSD + self.dropout(self.ffn(self.ffn_norm(h_MSD))), present


class LazyDecoder(nn.Module):
    """Context and target prefixes to logits of every SID level."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options, self.vocabulary = options, vocabulary
        self.context = ContextProcessor(options, vocabulary)
        self.bos = nn.Embedding(1, options.d_model)
        self.code_embeddings = nn.ModuleList(nn.Embedding(codes, options.d_model) for codes in vocabulary.codes[:-1])
        self.input_dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.n_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(options.d_model, eps=options.norm_eps) for _ in vocabulary.codes)
        self.heads = nn.ModuleList(nn.Linear(options.d_model, codes, bias=False) for codes in vocabulary.codes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, init_std); projections onto the residual stream are scaled by 1/sqrt(3 * n_layers) (assumption)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.options.init_std)
        residual_std = self.options.init_std / math.sqrt(3 * self.options.n_layers)
        for module in self.modules():
            if isinstance(module, CrossAttention | SelfAttention):
                nn.init.normal_(module.out.weight, std=residual_std)
            elif isinstance(module, SwiGLU):
                nn.init.normal_(module.down.weight, std=residual_std)

    def forward(self, context: Context, targets: Targets) -> tuple[list[Tensor], Tensor, Tensor]:
        """Teacher-forced logits of the targets that count (weight above 0), in row-major slot order.

        Returns logits per level, each (M, V_l), the codes (M, L) they are to predict, and the weights (M,).
        """
        rows, slots = targets.weight_BT.shape
        keep = targets.weight_BT.flatten() > 0
        layout = TargetLayout(rows, slots, None if bool(keep.all()) else keep.nonzero().squeeze(1))
        codes_ML, weight_M = targets.sid_BTL.flatten(0, 1), targets.weight_BT.flatten()
        if layout.index_M is not None:
            codes_ML, weight_M = codes_ML[layout.index_M], weight_M[layout.index_M]
        h_MSD = self.embed_prefix(codes_ML[:, :-1])
        mask_BTP = self.visible(context, targets.end_BT)
        h_MSD, _ = self.run_blocks(h_MSD, self.context(context), mask_BTP, layout)
        return [self.logits(h_MSD[:, level], level) for level in range(len(self.heads))], codes_ML, weight_M

    def embed_prefix(self, codes_MS: Tensor) -> Tensor:
        """[BOS, s_1 .. s_S] to (M, S + 1, D)."""
        bos_M1D = self.bos.weight.expand(codes_MS.shape[0], 1, -1)
        codes = [
            table(codes_MS[:, level, None]) for level, table in enumerate(self.code_embeddings[: codes_MS.shape[1]])
        ]
        return torch.cat((bos_M1D, *codes), dim=1)

    def visible(self, context: Context, end_BT: Tensor) -> Tensor:
        """(B, T, P): the static position always, an event if it lies before its target's `end`.

        While training, `context_dropout` hides events at random, alike for every target of a row.
        """
        rows, events = context.item_BN.shape
        index_N = torch.arange(events, device=end_BT.device)
        seen_BTN = index_N < torch.minimum(end_BT, context.length_B[:, None])[..., None]
        if self.training and self.options.context_dropout > 0:
            kept_B1N = torch.rand(rows, 1, events, device=end_BT.device) >= self.options.context_dropout
            seen_BTN = seen_BTN & kept_B1N
        return F.pad(seen_BTN, (1, 0), value=True)

    def run_blocks(
        self,
        h_MSD: Tensor,
        kv_sets: list[KeyValue],
        mask_BTP: Tensor,
        layout: TargetLayout,
        past: Sequence[KeyValue | None] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """All blocks; block l reads KV set floor(l * L_kv / N_layer). Returns hidden states, self-attention caches."""
        mask_BQP = mask_BTP.repeat_interleave(h_MSD.shape[1], dim=1)
        h_MSD = self.input_dropout(h_MSD)
        caches = []
        for index, block in enumerate(self.blocks):
            kv = kv_sets[index * self.options.l_kv // self.options.n_layers]
            h_MSD, present = block(h_MSD, kv, mask_BQP, layout, None if past is None else past[index])
            caches.append(present)
        return h_MSD, caches

    def logits(self, h_MD: Tensor, level: int) -> Tensor:
        """Position-specific norm and head of one SID level: (M, D) to (M, V)."""
        return self.heads[level](self.norms[level](h_MD))
