"""The naive decoder-only reference: context and target tokens are one causal sequence through every block
(OneRec-V2, section 2.5 and table 1). Plain, for honest comparison.

Legend: B rows, P context positions, T target slots, S tokens per target, Q = T * S target tokens, K beams, D width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.block import SelfBlock
from onetrain.model.context import ContextProcessor
from onetrain.model.decoder import Predictions, SidDecoder, TargetLayout
from onetrain.model.inputs import Context, Targets
from onetrain.model.moe import note_padding, routing_summary
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.pathway import NEVER


class BeamState(NamedTuple):
    """Keys and values of context and beams, per block."""

    index_BP: Tensor
    request: Mapping[str, Tensor]  # (M,)
    context: list[KeyValue]  # (B, H, P, K) each
    beams: list[KeyValue]  # (M, H, tokens so far, K) each; empty before level 0


class DecoderOnly(SidDecoder):
    """Every context position runs through every block; a target's tokens see what lies before its `end`."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__(options, vocabulary)
        self.context = ContextProcessor(options, vocabulary)
        self.input_dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(SelfBlock(options, options.is_sparse(index)) for index in range(options.n_layers))
        self.reset_parameters()

    def forward(self, context: Context, targets: Targets) -> Predictions:
        """Teacher-forced predictions of the targets that count (weight above 0), in row-major slot order."""
        layout, levels = TargetLayout.of(targets), self.vocabulary.levels
        rows, slots = targets.weight_BT.shape
        request = {name: ids_BT.flatten() for name, ids_BT in targets.request.items()}
        tokens_MSD = self.tokens.embed(targets.sid_BTL.flatten(0, 1)[:, :-1], request)
        x_BPD, index_BP = self.context(context)
        positions = x_BPD.shape[1]
        visible_BTP = index_BP[:, None] < targets.end_BT[..., None]
        own_QQ = torch.block_diag(*[torch.ones(levels, levels, device=x_BPD.device).tril()] * slots).bool()
        mask_BQX = torch.cat(
            (visible_BTP.repeat_interleave(levels, dim=1), own_QQ.expand(rows, -1, -1)), dim=2
        )  # X = P + Q
        of_context_BPX = nn.functional.pad(_causal(index_BP), (0, slots * levels))
        h_BXD = self.input_dropout(torch.cat((x_BPD, tokens_MSD.reshape(rows, -1, x_BPD.shape[-1])), dim=1))
        mask_B1XX = torch.cat((of_context_BPX, mask_BQX), dim=1)[:, None]
        counts_BQ = (targets.weight_BT > 0).repeat_interleave(levels, dim=1)
        real_BP = (index_BP != NEVER) & counts_BQ.any(1, keepdim=True)  # a row without targets counts for nothing
        note_padding(self, torch.cat((real_BP, counts_BQ), dim=1))
        for block in self.blocks:
            h_BXD, _ = block(h_BXD, mask_B1XX)
        h_MSD = layout.pick(h_BXD[:, positions:].unflatten(1, (slots, levels)))
        request = {name: layout.pick(ids_BT) for name, ids_BT in targets.request.items()}
        routing = routing_summary(self, by_position=False)
        if routing is not None and routing.loss_R is not None:  # a target's row
            routing = routing._replace(loss_R=layout.pick(routing.loss_R[:, None].expand(-1, slots)))
        codes_ML, weight_M = layout.pick(targets.sid_BTL), layout.pick(targets.weight_BT)
        return Predictions(list(h_MSD.unbind(1)), codes_ML, weight_M, [], None, routing, self.tokens, request)

    def start(self, context: Context, request: Mapping[str, Tensor]) -> BeamState:
        """Run the context through every block and keep its keys and values."""
        note_padding(self, None)  # nothing reads the records
        x_BPD, index_BP = self.context(context)
        mask_B1PP = _causal(index_BP)[:, None]
        caches = []
        for block in self.blocks:
            x_BPD, present = block(x_BPD, mask_B1PP)
            caches.append(present)
        return BeamState(index_BP, request, caches, [])

    def step(self, state: BeamState, level: int, code_BK: Tensor | None) -> tuple[Tensor, BeamState]:
        """Logits (B * K, V) of `level`: the beams' new tokens see their context and their own earlier tokens."""
        note_padding(self, None)  # a forward pass may have come between
        rows = state.index_BP.shape[0]
        beams = 1 if code_BK is None else code_BK.shape[1]
        if code_BK is None:
            token_M1D = self.tokens.embed(state.index_BP.new_zeros(rows, 0), state.request)
        else:
            token_M1D = self.tokens.embed_code(code_BK.flatten(), level - 1)[:, None]
        h_BKD = token_M1D.reshape(rows, beams, -1)
        context_BKP = (state.index_BP < NEVER)[:, None].expand(-1, beams, -1)
        own_KK = torch.eye(beams, dtype=torch.bool, device=h_BKD.device)
        earlier_KX = own_KK.repeat_interleave(level, dim=1)  # X = K * tokens so far, beam after beam
        mask_B1KX = torch.cat((context_BKP, torch.cat((earlier_KX, own_KK), 1).expand(rows, -1, -1)), dim=2)[:, None]
        caches = []
        for index, block in enumerate(self.blocks):
            past = state.context[index]
            if state.beams:
                past = KeyValue(
                    *(torch.cat((c, _beside(b, rows)), 2) for c, b in zip(past, state.beams[index], strict=True))
                )
            h_BKD, present = block(h_BKD, mask_B1KX, past)
            new = KeyValue(*(part[:, :, -beams:].transpose(1, 2).flatten(0, 1)[:, :, None] for part in present))
            if state.beams:
                new = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(state.beams[index], new, strict=True)))
            caches.append(new)
        logits_MV = self.tokens.logits(h_BKD.flatten(0, 1), level, state.request)
        return logits_MV, BeamState(state.index_BP, state.request, state.context, caches)

    def select(self, state: BeamState, source_M: Tensor) -> BeamState:
        """Beams continue the beams `source_M`; the context's keys stay one per row."""
        request = {name: ids_M[source_M] for name, ids_M in state.request.items()}
        return BeamState(state.index_BP, request, state.context, [cache.select(source_M) for cache in state.beams])


def _causal(index_BP: Tensor) -> Tensor:
    """(B, P, P): a context position sees the real ones up to itself; the first, the static one, is always real."""
    positions = index_BP.shape[1]
    earlier_PP = torch.ones(positions, positions, dtype=torch.bool, device=index_BP.device).tril()
    return earlier_PP & (index_BP != NEVER)[:, None]


def _beside(part_MHSK: Tensor, rows: int) -> Tensor:
    """(B * beams, H, S, K) to (B, H, beams * S, K), beam after beam."""
    return part_MHSK.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)
