"""Embeds the features of events, users and items: one table each, of its own width; large id spaces are hashed.

Legend: N events (or any leading shape), L SID levels, C concatenated feature width.
"""

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from onetrain.model.options import ModelOptions

_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit number (Fibonacci hashing)


def hash_ids(ids: Tensor, rows: int) -> Tensor:
    """Any int64 ids to [0, rows); equal ids share a row, and so do about len(ids) / rows others."""
    mixed = ids * _MULTIPLIER
    return ((mixed ^ (mixed >> 32)) & torch.iinfo(torch.int64).max) % rows


_TAKEN = nn.ModuleDict()


def module_key(name: str) -> str:
    """The key under which an nn.ModuleDict can hold `name`: `type`, `items` and others are attributes of its own."""
    return f"{name}_" if hasattr(_TAKEN, name) else name


class FeatureTables(nn.Module):
    """One embedding table per named feature, concatenated in the order of the names.

    Raises ValueError for a name that the data lack, and for an unbounded feature without `model.hashed` rows.
    """

    def __init__(self, names: Iterable[str], sizes: Mapping[str, int | None], options: ModelOptions) -> None:
        super().__init__()
        self.names = tuple(names)
        self.hashed = {name: options.hashed[name] for name in self.names if name in options.hashed}
        self.tables = nn.ModuleDict(
            {
                module_key(name): nn.Embedding(table_rows(name, sizes, options), options.width_of(name))
                for name in self.names
            }
        )
        self.width = sum(options.width_of(name) for name in self.names)

    def forward(self, ids: Mapping[str, Tensor]) -> Tensor:
        """Ids (...) of every feature to (..., C)."""
        return torch.cat([self.embed(name, ids[name]) for name in self.names], dim=-1)

    def embed(self, name: str, ids: Tensor) -> Tensor:
        """Ids (...) of one feature to (..., its width)."""
        return self.tables[module_key(name)](hash_ids(ids, self.hashed[name]) if name in self.hashed else ids)


def table_rows(name: str, sizes: Mapping[str, int | None], options: ModelOptions) -> int:
    """Rows of a feature's table: its hashed rows, or one for every id of the data."""
    if name not in sizes:
        close = difflib.get_close_matches(name, sizes, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"the model wants the feature {name!r}; the data have {', '.join(sizes)}.{hint}")
    size = options.hashed.get(name, sizes[name])
    if size is None:
        raise ValueError(f"the ids of feature {name!r} are unbounded; give it rows, such as model.hashed.{name}=100000")
    return size


class EventFeatures(nn.Module):
    """Concatenated embeddings of each event; with `flatten_codes`, of each of its SID codes (TIGER)."""

    def __init__(self, options: ModelOptions, codes: tuple[int, ...], sizes: Mapping[str, int | None]) -> None:
        super().__init__()
        others = FeatureTables([name for name in options.features if name != "sid"], sizes, options)
        width = options.width_of("sid")
        levels = codes if "sid" in options.features else ()
        self.sid_tables = nn.ModuleList(nn.Embedding(size, width) for size in levels)
        self.others = others if others.names else None
        self.flatten = options.flatten_codes
        self.width = others.width + width * (min(len(levels), 1) if self.flatten else len(levels))

    def forward(self, sid_BNL: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Returns (B, N, C), or (B, N * L, C) where codes are flattened."""
        codes = [table(sid_BNL[..., level]) for level, table in enumerate(self.sid_tables)]
        others = [] if self.others is None else [self.others(features)]
        if not self.flatten:
            return torch.cat((*codes, *others), dim=-1)
        per_code = [torch.cat((code, *others), dim=-1) for code in codes]
        return torch.stack(per_code, dim=2).flatten(1, 2)


class TimeMLP(nn.Module):
    """MLP(Concat(hour, day, week)) that is added to an event or to BOS (OneLive, section 3.2)."""

    def __init__(self, options: ModelOptions, sizes: Mapping[str, int | None], width: int) -> None:
        super().__init__()
        self.tables = FeatureTables(options.time_features, sizes, options)
        self.hidden = nn.Linear(self.tables.width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, ids: Mapping[str, Tensor]) -> Tensor:
        """Ids (...) of the time features to (..., width)."""
        return self.out(nn.functional.silu(self.hidden(self.tables(ids))))
