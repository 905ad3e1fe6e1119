"""Context processor: behaviour sequences and user features become context positions, once per request
(OneRec-V2, section 2.2; pathways of OneRec-V1; time-awareness of OneLive).

Legend: B context rows, N events of a sequence, P context positions (one static, then pathway after pathway),
C concatenated feature width, D context width, G KV groups, K head width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue, for_attention, split_heads
from onetrain.model.features import EventFeatures, FeatureTables, TimeMLP, module_key
from onetrain.model.inputs import Context, Events
from onetrain.model.ksa.cache import History
from onetrain.model.lifelong import LifelongPathway
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.pathway import ALWAYS, NEVER, Pathway, Positions, Project


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
            {
                module_key(name): LifelongPathway(options, name, width)
                if name in options.ksa
                else Pathway(options, name, length * per_event, width)
                for name, length in vocabulary.pathways.items()
            }
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
        return self._all(context, [self._pathway(name, context.sequences[name]) for name in self.names])

    def start(self, context: Context) -> tuple[Positions, dict[str, History]]:
        """What `forward` returns, and the histories of the lifelong pathways by name. Evaluation mode."""
        histories, parts = {}, []
        for name in self.names:
            pathway = self.pathways[module_key(name)]
            if isinstance(pathway, LifelongPathway):
                part, histories[name] = pathway.start(*self._events(context.sequences[name]))
            else:
                part = self._pathway(name, context.sequences[name])
            parts.append(part)
        return self._all(context, parts), histories

    def append(self, context: Context, histories: Mapping[str, History]) -> Positions:
        """What `forward` returns for all events so far: `context` has only the new events of lifelong pathways, whose
        histories they continue, and everything of the others.

        Events that cannot be embedded raise before any history has changed.
        """
        events, parts = {name: self._events(context.sequences[name]) for name in self.names}, []
        for name, (x_BNC, length_B, index_BN) in events.items():
            pathway = self.pathways[module_key(name)]
            if isinstance(pathway, LifelongPathway):
                parts.append(pathway.append(histories[name], x_BNC, length_B))
            else:
                parts.append(pathway(x_BNC, length_B, index_BN))
        return self._all(context, parts)

    def _all(self, context: Context, parts: list[Positions]) -> Positions:
        """The static position, then those of the pathways."""
        rows = len(context.length_B)
        static_B1D = self.static(context.user, rows)
        parts = [Positions(static_B1D, torch.full((rows, 1), ALWAYS, device=static_B1D.device)), *parts]
        return Positions(torch.cat([x for x, _ in parts], dim=1), torch.cat([index for _, index in parts], dim=1))

    def _pathway(self, name: str, events: Events) -> Positions:
        return self.pathways[module_key(name)](*self._events(events))

    def _events(self, events: Events) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, N, C), lengths (B,) and indices (B, N) of a pathway's events, or of their codes."""
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
        return x_BNC, length_B, index_BN

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
