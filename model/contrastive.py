"""Item tower of the in-batch contrastive loss (OneMall, sections 3.1 and 4); the loss itself is in loss.py.

Legend: M targets, F feature tokens of an item, W Query-Former width, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.features import FeatureTables
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.query_former import QueryFormer


class ItemTower(nn.Module):
    """f_item = MLP(Flatten(QFormer(Q, I, I))), where I is the sequence of the item's features."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        own = options.contrastive
        names = [name for name in own.features if name != "sid"]
        self.tables = FeatureTables(names, vocabulary.features, options)
        levels = vocabulary.codes if "sid" in own.features else ()
        self.sid_tables = nn.ModuleList(nn.Embedding(codes, options.width_of("sid")) for codes in levels)
        former = own.query_former
        widths = [options.width_of("sid")] * len(levels) + [options.width_of(name) for name in names]
        self.tokens = nn.ModuleList(nn.Linear(width, former.width, bias=False) for width in widths)
        self.query_former = QueryFormer(former, options.norm_eps)
        self.hidden = nn.Linear(former.queries * former.width, options.d_model, bias=False)
        self.out = nn.Linear(options.d_model, options.d_model, bias=False)

    def forward(self, codes_ML: Tensor, item: Mapping[str, Tensor]) -> Tensor:
        """SIDs and feature ids (M,) of items to (M, D)."""
        parts = [table(codes_ML[:, level]) for level, table in enumerate(self.sid_tables)]
        parts += [self.tables.embed(name, item[name]) for name in self.tables.names]
        tokens_MFW = torch.stack([linear(part) for linear, part in zip(self.tokens, parts, strict=True)], dim=1)
        seen_MF = torch.ones(tokens_MFW.shape[:2], dtype=torch.bool, device=tokens_MFW.device)
        return self.out(F.silu(self.hidden(self.query_former(tokens_MFW, seen_MF).flatten(1))))
