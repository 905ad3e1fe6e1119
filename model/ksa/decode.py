"""Histories that go on: filled by the fast path at once, then token by token (KSA, section 5.2).

A step writes only to slots that nobody can see at the lengths before it, and ends with one assignment of the lengths.
If it fails in any layer, the history is what it was.

Legend: B histories, A rows computed (B text rows, then summary rows), T text rows, R summary rows, Z chunks that a step
completes, C chunk, S summaries per chunk, H heads, K head width, D width.
"""

import torch
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.attention import own_chunk_attention
from onetrain.model.ksa.cache import History, LayerCache, history_rows
from onetrain.model.ksa.layout import Layout, Window, summary_offsets
from onetrain.model.ksa.part import Part, Sequence
from onetrain.model.ksa.stack import KSABlock, KSAStack


class _Filling(Sequence):
    """Attention of whole histories whose keys and values a cache keeps."""

    def __init__(self, layer: LayerCache) -> None:
        super().__init__()
        self.layer = layer

    def attend(
        self, q_HTK: Tensor, text: KeyValue, summary: KeyValue, part: Part, window: Window, kernel: str
    ) -> Tensor:
        """As for any histories; keys that no later token can see are not kept."""
        layout, layer = part.layout, self.layer
        row_T, row_R, number_R = history_rows(layout)
        left_T = layout.length_U.to(layout.device)[row_T] - layout.position_T  # tokens from here to the end
        kept_T = torch.ones_like(left_T, dtype=torch.bool) if layer.full else left_T <= layer.ring
        layer.write_text(row_T[kept_T], layout.position_T[kept_T], KeyValue(*(x_GTK[:, kept_T] for x_GTK in text)))
        layer.write_summaries(row_R, number_R, summary)
        return super().attend(q_HTK, text, summary, part, window, kernel)


@torch.no_grad()
def prefill(stack: KSAStack, x_TD: Tensor, layout: Layout) -> History:
    """Text tokens of whole histories, packed, through the stack's blocks; a history may be empty."""
    history = History(stack.options, len(layout.lengths), x_TD)
    if layout.n_text:
        part = Sequence().part(layout)
        x_AD = torch.cat((x_TD, stack.summary_tokens(part).to(x_TD.dtype)))
        for block, layer in zip(stack.blocks, history.layers, strict=True):
            x_AD = block(x_AD, part, _Filling(layer))
        history.keep(x_AD, layout)
        history.length_B = layout.length_U
    return history


@torch.no_grad()
def step(stack: KSAStack, history: History, x_BD: Tensor, active_B: Tensor | None = None) -> Tensor:
    """One more text token for every history, or for those that are `active`; their states, (B, D).

    A token that completes a chunk takes the chunk's summary tokens along. Rows of histories that sit out are nothing.
    """
    rows = len(history.length_B)
    active_B = torch.ones(rows, dtype=torch.bool) if active_B is None else active_B.cpu()
    if len(x_BD) != rows or len(active_B) != rows:
        raise ValueError(
            f"{len(x_BD)} tokens and {len(active_B)} marks of activity for {rows} histories; give one for each, and "
            "say in active_B which sit out"
        )
    if not active_B.any():
        return x_BD
    token = _Token(stack, history, active_B, x_BD.device)
    x_AD = x_BD
    if stack.summary is not None and len(token.chunk_row_Z):
        x_AD = torch.cat((x_BD, stack.summary.weight.repeat(len(token.chunk_row_Z), 1).to(x_BD.dtype)))
    for block, layer in zip(stack.blocks, history.layers, strict=True):
        assert isinstance(block, KSABlock)
        x_AD = token.through(block, layer, x_AD)
    history.write_states(token.row_X, token.position_B[token.row_X] % history.ring, x_AD[token.row_X])
    history.write_states(token.row_R, history.ring + token.number_R, x_AD[rows:])
    history.length_B = history.length_B + active_B
    return x_AD[:rows]


class _Token:
    """The newest token of every history: where it stands, and what comes with it."""

    def __init__(self, stack: KSAStack, history: History, active_B: Tensor, device: torch.device) -> None:
        chunk, summaries = stack.options.chunk, stack.options.summaries
        self.position_B = torch.where(active_B, history.length_B, 0).to(device)  # one that sits out sees nothing new
        self.row_X = active_B.nonzero().flatten().to(device)
        completed_B = active_B & ((history.length_B + 1) % chunk == 0) & (summaries > 0)
        self.chunk_row_Z = completed_B.nonzero().flatten().to(device)
        self.first_Z = self.position_B[self.chunk_row_Z] + 1 - chunk
        self.summaries = summaries
        slot_S = torch.arange(summaries, device=device)
        self.row_R = self.chunk_row_Z.repeat_interleave(summaries)
        self.number_R = (self.first_Z[:, None] // chunk * summaries + slot_S).flatten()
        self.summary_position_R = (self.first_Z[:, None] + summary_offsets(chunk, summaries).to(device)).flatten()
        one_of_each = {layer.full: layer for layer in history.layers}
        self.seen_BN = {full: layer.seen(self.position_B) for full, layer in one_of_each.items()}

    def through(self, block: KSABlock, layer: LayerCache, x_AD: Tensor) -> Tensor:
        """One block; rows [text; summaries], same shape."""
        text = len(self.position_B)
        inside_AD, aside_RD = (x_AD[:text], x_AD[text:]) if block.bypass else (x_AD, x_AD[:0])
        inside_AD = inside_AD + self._attention(block, layer, block.attention_norm(inside_AD))
        return torch.cat((inside_AD + block.ffn(block.ffn_norm(inside_AD)), aside_RD))

    def _attention(self, block: KSABlock, layer: LayerCache, h_AD: Tensor) -> Tensor:
        attention, text = block.attention, len(self.position_B)
        heads = attention.project_text(h_AD[:text], self.position_B)
        new = KeyValue(*(x_GBK[:, self.row_X] for x_GBK in heads.kv))
        layer.write_text(self.row_X, self.position_B[self.row_X], new)
        y_HAK = layer.attend(heads.q_HNK, self.seen_BN[layer.full])
        if len(h_AD) > text:
            summary = attention.project_summaries(h_AD[text:], self.summary_position_R)
            layer.write_summaries(self.row_R, self.number_R, summary.kv)
            of_chunks = layer.chunk_text(self.chunk_row_Z, self.first_Z)
            rows_ZC = torch.arange(of_chunks.key_BGNK.shape[1], device=h_AD.device).unflatten(
                0, (len(self.first_Z), -1)
            )
            own_HRK = own_chunk_attention(summary, of_chunks, rows_ZC, self.summaries)
            y_HAK = torch.cat((y_HAK, own_HRK), dim=1)
        return attention.out(y_HAK.transpose(0, 1).flatten(1))
