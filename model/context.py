"""Context processor: behaviour events become key/value sets, once per request (OneRec-V2, section 2.2).

Legend: B context rows, N events, P context positions (one static + N), D context width, G KV groups, K head width,
L SID levels, C concatenated feature width.
"""

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.inputs import Context
from onetrain.model.options import ModelOptions, Vocabulary


class EventFeatures(nn.Module):
    """Embeds each event's features with width `embed_dim` each and concatenates them."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = options.embed_dim
        sizes = {
            "item": vocabulary.n_items,
            "behaviour": vocabulary.n_behaviours,
            "scenario": vocabulary.n_scenarios,
            "gap": vocabulary.n_gaps,
        }
        self.names = tuple(name for name in options.features if name != "sid")
        self.tables = nn.ModuleDict({name: nn.Embedding(sizes[name], width) for name in self.names})
        levels = vocabulary.codes if "sid" in options.features else ()
        self.sid_tables = nn.ModuleList(nn.Embedding(codes, width) for codes in levels)
        self.width = width * (len(self.names) + len(levels))

    def forward(self, context: Context) -> Tensor:
        """Returns (B, N, C)."""
        parts = [table(context.sid_BNL[..., level]) for level, table in enumerate(self.sid_tables)]
        parts += [self.tables[name](getattr(context, f"{name}_BN")) for name in self.names]
        return torch.cat(parts, dim=-1)


class ContextProcessor(nn.Module):
    """Pathways to {(k_l, v_l)}: per-pathway linear and RMSNorm, split into S_kv * L_kv chunks, RMSNorm per chunk.

    Two pathways: the user-static one is a single learned position (the event schema has no user features), and one
    behaviour sequence. Positions are learned per pathway (assumption of the specification): counted from the oldest
    event of the window (`absolute`) or back from the newest (`recency`).
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.features = EventFeatures(options, vocabulary)
        self.project = nn.Linear(self.features.width, options.d_context, bias=False)
        self.position = (
            nn.Embedding(vocabulary.max_context, self.features.width) if options.position != "none" else None
        )
        self.static = nn.Embedding(1, options.d_context)
        self.event_norm = nn.RMSNorm(options.d_context, eps=options.norm_eps)
        self.static_norm = nn.RMSNorm(options.d_context, eps=options.norm_eps)
        chunk = options.kv_groups * options.d_head
        self.key_norms = nn.ModuleList(nn.RMSNorm(chunk, eps=options.norm_eps) for _ in range(options.l_kv))
        separate = options.l_kv if options.s_kv == 2 else 0
        self.value_norms = nn.ModuleList(nn.RMSNorm(chunk, eps=options.norm_eps) for _ in range(separate))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, context: Context) -> list[KeyValue]:
        """Returns L_kv sets of keys and values, each (B, G, P, K) with P = 1 + N."""
        events_BNC = self.features(context)
        if self.position is not None:
            events_BNC = events_BNC + self.position(self._positions(context))
        events_BND = self.event_norm(self.project(self.dropout(events_BNC)))
        static_B1D = self.static_norm(self.static.weight).expand(events_BND.shape[0], 1, -1)
        context_BPD = torch.cat((static_B1D, events_BND), dim=1)
        return self._split(context_BPD)

    def _positions(self, context: Context) -> Tensor:
        index_1N = torch.arange(context.item_BN.shape[1], device=context.item_BN.device)[None]
        if self.options.position == "absolute":
            return index_1N
        return (context.length_B[:, None] - 1 - index_1N).clamp_min(0)

    def _split(self, context_BPD: Tensor) -> list[KeyValue]:
        chunks = context_BPD.chunk(self.options.s_kv * self.options.l_kv, dim=-1)

        def heads(x_BPD: Tensor) -> Tensor:
            return x_BPD.unflatten(-1, (self.options.kv_groups, -1)).transpose(1, 2)

        sets = []
        for layer, norm in enumerate(self.key_norms):
            first = layer * self.options.s_kv
            key = value = heads(norm(chunks[first]))
            if self.value_norms:
                value = heads(self.value_norms[layer](chunks[first + 1]))
            sets.append(KeyValue(key, value))
        return sets
