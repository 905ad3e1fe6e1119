"""Options of the networks: what a configuration's `model:` section may say.

Legend: d = width, L = SID levels, V = codes per level, G = KV groups.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelOptions:
 .npy, row i = i-th item of the item table.s source order  """The dense OneRec-V2 lazy decoder (arXiv 2508.20900, section 2).

 .npy, row i = i-th item of the item table.s source order  Defaults marked "assumption" are not in the paper; each is the most standard choice.
 .npy, row i = i-th item of the item table.s source order  """

 .npy, row i = i-th item of the item table.s source order  d_model: int = 256
 .npy, row i = i-th item of the item table.s source order  n_layers: int = 4
 .npy, row i = i-th item of the item table.s source order  n_heads: int = 4
 .npy, row i = i-th item of the item table.s source order  d_ff: int | None = None  # None = 4 * d_model, the width that matches every published size
 .npy, row i = i-th item of the item table.s source order  l_kv: int = 1  # distinct context KV sets shared across layers
 .npy, row i = i-th item of the item table.s source order  s_kv: int = 1  # 1 = key and value are one tensor, 2 = separate
 .npy, row i = i-th item of the item table.s source order  g_kv: int | None = None  # KV head groups; None = n_heads
 .npy, row i = i-th item of the item table.s source order  embed_dim: int = 64  # width of each context feature embedding (Table 5)
 .npy, row i = i-th item of the item table.s source order  features: tuple[Literal["sid", "item", "behaviour", "scenario", "gap"], ...] = ("sid",)
 .npy, row i = i-th item of the item table.s source order  position: Literal["absolute", "recency", "none"] = "absolute"  # assumption: learned positions
 .npy, row i = i-th item of the item table.s source order  dropout: float = 0.0
 .npy, row i = i-th item of the item table.s source order  context_dropout: float = 0.0  # share of context events hidden while training
 .npy, row i = i-th item of the item table.s source order  init_std: float = 0.02
 .npy, row i = i-th item of the item table.s source order  norm_eps: float = 1e-6

 .npy, row i = i-th item of the item table.s source order  def __post_init__(self) -> None:
 .npy, row i = i-th item of the item table.s source order      if self.d_model % self.n_heads:
 .npy, row i = i-th item of the item table.s source order          raise ValueError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}")
 .npy, row i = i-th item of the item table.s source order      if self.n_heads % self.kv_groups:
 .npy, row i = i-th item of the item table.s source order          raise ValueError(f"model.n_heads {self.n_heads} is not a multiple of model.g_kv {self.kv_groups}")
 .npy, row i = i-th item of the item table.s source order      if self.s_kv not in (1, 2):
 .npy, row i = i-th item of the item table.s source order          raise ValueError(f"model.s_kv is {self.s_kv}; it is 1 (one tensor for key and value) or 2 (separate)")
 .npy, row i = i-th item of the item table.s source order      if not 1 <= self.l_kv <= self.n_layers:
 .npy, row i = i-th item of the item table.s source order          raise ValueError(f"model.l_kv is {self.l_kv}; it is between 1 and model.n_layers ({self.n_layers})")
 .npy, row i = i-th item of the item table.s source order      if not self.features:
 .npy, row i = i-th item of the item table.s source order          raise ValueError("model.features is empty; the context needs at least one feature, for example [sid]")
 .npy, row i = i-th item of the item table.s source order      for name in ("dropout", "context_dropout"):
 .npy, row i = i-th item of the item table.s source order          if not 0.0 <= getattr(self, name) < 1.0:
 .npy, row i = i-th item of the item table.s source order              raise ValueError(f"model.{name} is {getattr(self, name)}; it is in [0, 1)")

 .npy, row i = i-th item of the item table.s source order  @property
 .npy, row i = i-th item of the item table.s source order  def kv_groups(self) -> int:
 .npy, row i = i-th item of the item table.s source order      """G_kv with its default resolved."""
 .npy, row i = i-th item of the item table.s source order      return self.n_heads if self.g_kv is None else self.g_kv

 .npy, row i = i-th item of the item table.s source order  @property
 .npy, row i = i-th item of the item table.s source order  def d_head(self) -> int:
 .npy, row i = i-th item of the item table.s source order      """Width of one attention head."""
 .npy, row i = i-th item of the item table.s source order      return self.d_model // self.n_heads

 .npy, row i = i-th item of the item table.s source order  @property
 .npy, row i = i-th item of the item table.s source order  def ffn_width(self) -> int:
 .npy, row i = i-th item of the item table.s source order      """Hidden width of the SwiGLU FFN."""
 .npy, row i = i-th item of the item table.s source order      return 4 * self.d_model if self.d_ff is None else self.d_ff

 .npy, row i = i-th item of the item table.s source order  @property
 .npy, row i = i-th item of the item table.s source order  def d_context(self) -> int:
 .npy, row i = i-th item of the item table.s source order      """Width of one context position: S_kv * L_kv * G_kv * d_head."""
 .npy, row i = i-th item of the item table.s source order      return self.s_kv * self.l_kv * self.kv_groups * self.d_head


@dataclass(frozen=True)
class Vocabulary:
 .npy, row i = i-th item of the item table.s source order  """Sizes that come from the data, not from the configuration."""

 .npy, row i = i-th item of the item table.s source order  codes: tuple[int, ...]  # V of each SID level
 .npy, row i = i-th item of the item table.s source order  n_items: int
 .npy, row i = i-th item of the item table.s source order  n_behaviours: int
 .npy, row i = i-th item of the item table.s source order  n_scenarios: int
 .npy, row i = i-th item of the item table.s source order  max_context: int  # longest context window, in events

 .npy, row i = i-th item of the item table.s source order  @property
 .npy, row i = i-th item of the item table.s source order  def levels(self) -> int:
 .npy, row i = i-th item of the item table.s source order      """Number of SID levels L."""
 .npy, row i = i-th item of the item table.s source order      return len(self.codes)


@dataclass(frozen=True)
class TokenizerOptions:
 .npy, row i = i-th item of the item table.s source order  """Residual K-means over item embeddings: the `tokenizer:` section."""

 .npy, row i = i-th item of the item table.s source order  embedding: Literal["array", "column", "text", "cooccurrence", "text+cooccurrence", "array+cooccurrence"] = "column"
 .npy, row i = i-th item of the item table.s source order  array: str | None = None  # .npy, row i = i-th item of the item table's source order
 .npy, row i = i-th item of the item table.s source order  text_model: str = "all-MiniLM-L6-v2"
 .npy, row i = i-th item of the item table.s source order  cooccurrence_dim: int = 64
 .npy, row i = i-th item of the item table.s source order  cooccurrence_window: int = 5
 .npy, row i = i-th item of the item table.s source order  codebook: tuple[int, ...] = (256, 256, 256)  # codes per level, 3 or 4 levels
 .npy, row i = i-th item of the item table.s source order  collisions: Literal["share", "next_free", "extra_level"] = "next_free"
 .npy, row i = i-th item of the item table.s source order  iterations: int = 50
 .npy, row i = i-th item of the item table.s source order  restarts: int = 1

 .npy, row i = i-th item of the item table.s source order  def __post_init__(self) -> None:
 .npy, row i = i-th item of the item table.s source order      if not 1 <= len(self.codebook) <= 4 or min(self.codebook) < 2:
 .npy, row i = i-th item of the item table.s source order          raise ValueError(f"tokenizer.codebook is {list(self.codebook)}; it has 1 to 4 levels of at least 2 codes")
 .npy, row i = i-th item of the item table.s source order      if "array" in self.embedding and self.array is None:
 .npy, row i = i-th item of the item table.s source order          raise ValueError(f"tokenizer.embedding is {self.embedding!r}, so tokenizer.array must name a .npy file")
