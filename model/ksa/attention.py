"""The attention of one layer: text rows read text and old summaries, summary rows their own chunk (KSA, section 2).

Legend: T text rows, R summary rows, A = T + R, Z complete chunks, C chunk, S summaries per chunk, H query heads,
G KV groups, F = H / G, K head width, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.ksa.layout import Window
from onetrain.model.ksa.part import Part, Sequence
from onetrain.model.ksa.rotary import rotate
from onetrain.model.options import KSAOptions
from onetrain.model.precision import wide


class Heads(NamedTuple):
    """Queries, keys and values of some rows, turned by their positions."""

    q_HNK: Tensor
    k_GNK: Tensor
    v_GNK: Tensor

    @property
    def kv(self) -> KeyValue:
        """Keys and values."""
        return KeyValue(self.k_GNK, self.v_GNK)


class Projections(nn.Module):
    """W_Q, W_K and W_V of one kind of token."""

    def __init__(self, options: KSAOptions) -> None:
        super().__init__()
        self.query = nn.Linear(options.width, options.width, bias=False)
        self.key = nn.Linear(options.width, options.groups * options.d_head, bias=False)
        self.value = nn.Linear(options.width, options.groups * options.d_head, bias=False)


class KSAAttention(nn.Module):
    """Summary attention, or in a `full` layer causal attention over text.

    `blend` is the weight of the summary tokens' own projections against the text's (section 2.3): 1 and 0 use one of
    them alone, to the bit. Output projection and QK-norm are shared.
    """

    blend: Tensor

    def __init__(self, options: KSAOptions, full: bool, norm_eps: float) -> None:
        super().__init__()
        self.options, self.full = options, full
        own = options.projects_summaries("full" if full else "ksa")
        self.text = Projections(options)
        self.summary = Projections(options) if own else None
        self.out = nn.Linear(options.width, options.width, bias=False)
        self.q_norm = nn.RMSNorm(options.d_head, eps=norm_eps) if options.qk_norm else None
        self.k_norm = nn.RMSNorm(options.d_head, eps=norm_eps) if options.qk_norm else None
        self.register_buffer("blend", torch.tensor(options.blend), persistent=own)

    def forward(self, h_AD: Tensor, part: Part, sequence: Sequence) -> Tensor:
        """Rows [text; summaries] of the part; (A, D). Without summary rows among them it is for text alone."""
        text = self.project_text(h_AD[: part.n_text], part.position_T)
        own = self.summary is not None and part.layout.summaries > 0  # even for no rows: all ranks use all parameters
        if len(h_AD) == part.n_text and not own:
            nothing = KeyValue(text.k_GNK[:, :0], text.v_GNK[:, :0])
            return self._join(self._attend(text, nothing, part, sequence))
        summary = self.project_summaries(h_AD[part.n_text :], part.position_R)
        own_HRK = own_chunk_attention(summary, text.kv, part.chunk_text_ZC, self.options.summaries)
        return self._join(torch.cat((self._attend(text, summary.kv, part, sequence), own_HRK), dim=1))

    def project_text(self, h_ND: Tensor, position_N: Tensor) -> Heads:
        """Of text tokens at these positions of their histories."""
        return self._turned(self._normed(h_ND, self.text), position_N)

    def project_summaries(self, h_ND: Tensor, position_N: Tensor) -> Heads:
        """Of summary tokens: blended after projection and norm, before they are turned."""
        blend = float(self.blend)
        if self.summary is None or (blend == 0 and not torch.is_grad_enabled()):  # else they get a gradient, of zero
            return self.project_text(h_ND, position_N)
        own = self._normed(h_ND, self.summary)
        if blend < 1:
            shared = self._normed(h_ND, self.text)
            own = Heads(*(blend * x + (1 - blend) * y for x, y in zip(own, shared, strict=True)))
        return self._turned(own, position_N)

    def _attend(self, text: Heads, summary: KeyValue, part: Part, sequence: Sequence) -> Tensor:
        window: Window = "full" if self.full else self.options.window
        return sequence.attend(text.q_HNK, text.kv, summary, part, window, self.options.kernel)

    def _join(self, y_HAK: Tensor) -> Tensor:
        return self.out(y_HAK.transpose(0, 1).flatten(1))

    def _normed(self, h_ND: Tensor, projections: Projections) -> Heads:
        q_HNK, k_GNK, v_GNK = (
            layer(h_ND).unflatten(-1, (-1, self.options.d_head)).transpose(0, 1)
            for layer in (projections.query, projections.key, projections.value)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_HNK, k_GNK = self.q_norm(q_HNK), self.k_norm(k_GNK)
        return Heads(q_HNK, k_GNK, v_GNK)

    def _turned(self, heads: Heads, position_N: Tensor) -> Heads:
        base = self.options.rope_base
        return Heads(rotate(heads.q_HNK, position_N, base), rotate(heads.k_GNK, position_N, base), heads.v_GNK)


def attentions(module: nn.Module) -> list[KSAAttention]:
    """Those of all layers inside `module`, in order."""
    return [inner for inner in module.modules() if isinstance(inner, KSAAttention)]


def own_chunk_attention(summary: Heads, text: KeyValue, chunk_text_ZC: Tensor, summaries: int) -> Tensor:
    """Summary tokens attend to the text of their chunk and to its summaries up to themselves; (H, R, K)."""
    groups, width, chunk = text.key_BGNK.shape[0], text.key_BGNK.shape[-1], chunk_text_ZC.shape[1]
    q_GFZSK = wide(summary.q_HNK).unflatten(0, (groups, -1)).unflatten(2, (-1, summaries))
    q_GZXK = q_GFZSK.transpose(1, 2).flatten(2, 3) / math.sqrt(width)  # X = F * S
    key_GZCK, value_GZCK = (_chunks(wide(x_GTK), chunk_text_ZC) for x_GTK in text)
    key_GZSK, value_GZSK = (wide(x_GRK).unflatten(1, (-1, summaries)) for x_GRK in summary.kv)
    own_GZXS = q_GZXK @ key_GZSK.transpose(-1, -2)
    if summaries > 1:
        later_SS = torch.ones(summaries, summaries, dtype=torch.bool, device=own_GZXS.device).triu(1)
        own_GZXS = own_GZXS.masked_fill(later_SS.repeat(own_GZXS.shape[2] // summaries, 1), -math.inf)
    weight_GZXY = torch.cat((q_GZXK @ key_GZCK.transpose(-1, -2), own_GZXS), dim=-1).softmax(-1)  # Y = C + S
    y_GZXK = weight_GZXY[..., :chunk] @ value_GZCK + weight_GZXY[..., chunk:] @ value_GZSK
    y_GFZSK = y_GZXK.unflatten(2, (-1, summaries)).transpose(1, 2)
    return y_GFZSK.flatten(2, 3).flatten(0, 1).to(summary.q_HNK.dtype)


def _chunks(x_GTK: Tensor, chunk_text_ZC: Tensor) -> Tensor:
    """The rows of every chunk (G, Z, C, K): a view where they lie together, as those of one history do."""
    if x_GTK.device.type == "cpu" and len(chunk_text_ZC):  # elsewhere looking would wait for the device
        first, last = int(chunk_text_ZC[0, 0]), int(chunk_text_ZC[-1, -1])
        if last - first + 1 == chunk_text_ZC.numel():
            return x_GTK[:, first : last + 1].unflatten(1, chunk_text_ZC.shape)
    return x_GTK.index_select(1, chunk_text_ZC.flatten()).unflatten(1, chunk_text_ZC.shape)
