"""Options of the networks: what a configuration's `model:` section may say.

Legend: d = width, L = SID levels, V = codes per level, G = KV groups.
"""

from dataclasses import dataclass
from typing import Literal

FIELD_OF = {"kv_groups": "g_kv", "ffn_width": "d_ff"}


@dataclass(frozen=True)
class ModelOptions:
    """The dense OneRec-V2 lazy decoder (arXiv 2508.20900, section 2).

    Defaults marked "assumption" are not in the paper; each is the most standard choice.
    """

    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int | None = None  # None = 4 * d_model, the width that matches every published size
    l_kv: int = 1  # distinct context KV sets shared across layers
    s_kv: int = 1  # 1 = key and value are one tensor, 2 = separate
    g_kv: int | None = None  # KV head groups; None = n_heads
    embed_dim: int = 64  # width of each context feature embedding (Table 5)
    features: tuple[Literal["sid", "item", "behaviour", "scenario", "gap"], ...] = ("sid",)
    position: Literal["absolute", "recency", "none"] = "absolute"  # assumption: learned positions
    dropout: float = 0.0
    context_dropout: float = 0.0  # share of context events hidden while training
    init_std: float = 0.02
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "kv_groups", "ffn_width", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{FIELD_OF.get(name, name)} is {getattr(self, name)}; it is at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}")
        if self.n_heads % self.kv_groups:
            raise ValueError(f"model.n_heads {self.n_heads} is not a multiple of model.g_kv {self.kv_groups}")
        if self.s_kv not in (1, 2):
            raise ValueError(f"model.s_kv is {self.s_kv}; it is 1 (one tensor for key and value) or 2 (separate)")
        if not 1 <= self.l_kv <= self.n_layers:
            raise ValueError(f"model.l_kv is {self.l_kv}; it is between 1 and model.n_layers ({self.n_layers})")
        if not self.features:
            raise ValueError("model.features is empty; the context needs at least one feature, for example [sid]")
        for name in ("dropout", "context_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it is in [0, 1)")

    @property
    def kv_groups(self) -> int:
        """G_kv with its default resolved."""
        return self.n_heads if self.g_kv is None else self.g_kv

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def ffn_width(self) -> int:
        """Hidden width of the SwiGLU FFN."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def d_context(self) -> int:
        """Width of one context position: S_kv * L_kv * G_kv * d_head."""
        return self.s_kv * self.l_kv * self.kv_groups * self.d_head


@dataclass(frozen=True)
class Vocabulary:
    """Sizes that come from the data, not from the configuration."""

    codes: tuple[int, ...]  # V of each SID level
    n_items: int
    n_behaviours: int
    n_scenarios: int
    max_context: int  # longest context window, in events
    n_gaps: int = 32  # buckets of the time since the event before

    @property
    def levels(self) -> int:
        """Number of SID levels L."""
        return len(self.codes)


@dataclass(frozen=True)
class TokenizerOptions:
    """Residual K-means over item embeddings: the `tokenizer:` section."""

    embedding: Literal["array", "column", "text", "cooccurrence", "text+cooccurrence", "array+cooccurrence"] = "column"
    array: str | None = None  # .npy, row i = item i of the item table, which is sorted by id
    text_model: str = "all-MiniLM-L6-v2"
    cooccurrence_dim: int = 64
    cooccurrence_window: int = 5
    codebook: tuple[int, ...] = (256, 256, 256)  # codes per level, 3 or 4 levels
    collisions: Literal["share", "next_free", "extra_level"] = "next_free"
    iterations: int = 50
    restarts: int = 1

    def __post_init__(self) -> None:
        if not 1 <= len(self.codebook) <= 4 or min(self.codebook) < 2:
            raise ValueError(f"tokenizer.codebook is {list(self.codebook)}; it has 1 to 4 levels of at least 2 codes")
        if "array" in self.embedding and self.array is None:
            raise ValueError(f"tokenizer.embedding is {self.embedding!r}, so tokenizer.array must name a .npy file")
