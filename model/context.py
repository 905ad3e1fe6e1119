"""Context processor: behaviour sequences and user features become context positions, once per request
(OneRec-V2, section 2.2; pathways of OneRec-V1; Query-Formers of OneMall; time-awareness of OneLive).

Legend: B context rows, N events of a sequence, M queries of a Query-Former, P context positions (one static, then
pathway after pathway), C concatenated feature width, D context width, G KV groups, K head width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.attention import KeyValue, for_attention, split_heads
from onetrain.model.features import EventFeatures, FeatureTables, TimeMLP, module_key
from onetrain.model.inputs import Context, Events
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.query_former import QueryFormer

ALWAYS = torch.iinfo(torch.int64).min  # index of a position that every target sees
NEVER = torch.iinfo(torch.int64).max  # of padding


class Positions(NamedTuple):
    """Context positions; a target of `end` e sees those whose index is below e."""

    x_BPD: Tensor
    index_BP: Tensor  # int64


class Project(nn.Module):
    """The linear of a pathway (OneRec-V2, figure 4), or Dense-LeakyReLU-Dense (OneRec-V1, section 2.6)."""

    def __init__(self, width: int, out: int, mlp: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, out, bias=False) if mlp else None
        self.out = nn.Linear(out if mlp else width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., out)."""
        return self.out(x if self.hidden is None else F.leaky_relu(self.hidden(x)))


class Pathway(nn.Module):
    """One behaviour sequence: learned positions, projection, RMSNorm; with a Query-Former, queries instead of events.

    Positions are learned per pathway (assumption of the specification): counted from the oldest event of the sequence
    (`absolute`) or back from the newest (`recency`).
    """

    def __init__(self, options: ModelOptions, name: str, length: int, width: int) -> None:
        super().__init__()
        self.recency = options.position == "recency"
        self.position = nn.Embedding(length, width) if options.position != "none" else None
        former = options.query_formers.get(name)
        mlp = options.pathway_projection == "mlp"
        self.project = Project(width, options.d_context if former is None else former.width, mlp)
        self.query_former = None if former is None else QueryFormer(former, options.norm_eps)
        self.expand = None if former is None else nn.Linear(former.width, options.d_context, bias=False)
        self.norm = nn.RMSNorm(options.d_context, eps=options.norm_eps)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x_BNC: Tensor, length_B: Tensor, index_BN: Tensor) -> Positions:
        """Event embeddings to context positions: (B, N, D), or (B, M, D) through a Query-Former."""
        if self.position is not None:
            place = torch.arange(x_BNC.shape[1], device=x_BNC.device)[None]
            x_BNC = x_BNC + self.position((length_B[:, None] - 1 - place).clamp_min(0) if self.recency else place)
        x_BND = self.project(self.dropout(x_BNC))
        if self.query_former is not None and self.expand is not None:
            x_BND = self.expand(self.query_former(x_BND, index_BN != NEVER))
            index_BN = index_BN.new_full(x_BND.shape[:2], ALWAYS)
        return Positions(self.norm(x_BND), index_BN)


class UserStatic(nn.Module):
    """The user-static pathway, one position: Dense-LeakyReLU-Dense of the user's features (OneRec-V1, section 2.6).

    Without user features it is one learned vector.
    """

    def __init__(self, options: ModelOptions, sizes: Mapping[str, int | None]) -> None:
        super().__init__()
        self.features = FeatureTables(options.user_features, sizes, options) if options.user_features else None
        self.project = None if self.features is None else Project(self.features.width, options.d_context, mlp=True)
        self.vector = nn.Embedding(1, options.d_context) if self.features is None else None
        self.norm = nn.RMSNorm(options.d_context, eps=options.norm_eps)

    def forward(self, user: Mapping[str, Tensor], rows: int) -> Tensor:
        """Returns (B, 1, D)."""
        if self.vector is not None:
            return self.norm(self.vector.weight).expand(rows, 1, -1)
        assert self.features is not None
        assert self.project is not None
        return self.norm(self.project(self.features(user)))[:, None]


class ContextProcessor(nn.Module):
    """Every pathway to context positions of one width; for shared_kv also the split into key/value sets."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options, self.levels = options, vocabulary.levels
        self.features = EventFeatures(options, vocabulary.codes, vocabulary.features)
        width, per_event = self.features.width, self.levels if options.flatten_codes else 1
        self.time = TimeMLP(options, vocabulary.features, width) if options.time_aware else None
        self.static = UserStatic(options, vocabulary.user_features)
        self.pathways = nn.ModuleDict(
            {module_key(name): Pathway(options, name, n * per_event, width) for name, n in vocabulary.pathways.items()}
        )
        self.names = tuple(vocabulary.pathways)
        shared = options.cross_attention == "shared_kv" and options.architecture == "lazy_decoder"
        chunk, sets = options.kv_groups * options.d_head, options.l_kv if shared else 0
        self.key_norms = nn.ModuleList(nn.RMSNorm(chunk, eps=options.norm_eps) for _ in range(sets))
        self.value_norms = nn.ModuleList(
            nn.RMSNorm(chunk, eps=options.norm_eps) for _ in range(sets if options.s_kv == 2 else 0)
        )
        self.own_groups: nn.Module = nn.Identity()  # under tensor parallelism: those that this rank's heads read

    def forward(self, context: Context) -> Positions:
        """Returns the static position and those of every pathway, in order.

        While training, `context_dropout` hides events at random, alike from every target of a row.
        """
        rows = len(context.length_B)
        static_B1D = self.static(context.user, rows)
        parts = [Positions(static_B1D, torch.full((rows, 1), ALWAYS, device=static_B1D.device))]
        parts += [self._pathway(name, context.sequences[name]) for name in self.names]
        return Positions(torch.cat([x for x, _ in parts], dim=1), torch.cat([index for _, index in parts], dim=1))

    def _pathway(self, name: str, events: Events) -> Positions:
        x_BNC = self.features(events.sid_BNL, events.features)
        index_BN, length_B = events.index_BN, events.length_B
        real_BN = torch.arange(index_BN.shape[1], device=index_BN.device) < length_B[:, None]
        if self.training and self.options.context_dropout > 0:
            real_BN = real_BN & (torch.rand(real_BN.shape, device=real_BN.device) >= self.options.context_dropout)
        index_BN = torch.where(real_BN, index_BN, NEVER)
        time_BNC = None if self.time is None else self.time(events.features)
        if self.options.flatten_codes:
            index_BN, length_B = index_BN.repeat_interleave(self.levels, dim=1), length_B * self.levels
            time_BNC = None if time_BNC is None else time_BNC.repeat_interleave(self.levels, dim=1)
        if time_BNC is not None:
            x_BNC = x_BNC + time_BNC
        return self.pathways[module_key(name)](x_BNC, length_B, index_BN)

    def key_value_sets(self, x_BPD: Tensor) -> list[KeyValue]:
        """{(k_l, v_l)}: the width split into S_kv * L_kv chunks, RMSNorm each; L_kv sets of (B, G, P, K)."""
        options = self.options
        chunks = x_BPD.chunk(options.s_kv * options.l_kv, dim=-1)
        sets = []
        for layer, norm in enumerate(self.key_norms):
            first = layer * options.s_kv
            key = value = self.own_groups(split_heads(norm(chunks[first]), options.kv_groups))
            if self.value_norms:
                value = self.own_groups(split_heads(self.value_norms[layer](chunks[first + 1]), options.kv_groups))
            sets.append(for_attention(KeyValue(key, value)))
        return sets
