"""Options of the networks: what a configuration's `model:` section may say, and the sizes that the data add.

Legend: d = width, L = SID levels, V = codes per level, G = KV groups.
"""

from dataclasses import dataclass, field
from typing import Literal

FIELD_OF = {"kv_groups": "g_kv", "ffn_width": "d_ff"}


def _check_distinct(key: str, names: tuple[str, ...]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{key} names {', '.join(repeated)} more than once")


@dataclass(frozen=True)
class QueryFormerOptions:
    """Learned queries that read a sequence in a few blocks of cross-attention and FFN (OneMall, section 3.1).

    Depth, norms and a width below d_model are assumptions; 10 queries and width 128 are the paper's examples.
    """

    queries: int = 10
    width: int = 128
    blocks: int = 2
    heads: int = 4
    d_ff: int | None = None  # None = 4 * width

    def __post_init__(self) -> None:
        for name in ("queries", "width", "blocks", "heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"query former: {FIELD_OF.get(name, name)} is {getattr(self, name)}; it is at least 1")
        if self.width % self.heads:
            raise ValueError(f"query former: width {self.width} is not a multiple of heads {self.heads}")

    @property
    def ffn_width(self) -> int:
        """Hidden width of the SwiGLU FFN."""
        return 4 * self.width if self.d_ff is None else self.d_ff


@dataclass(frozen=True)
class KSAOptions:
    """A stack of summary attention over one pathway (KSA, arXiv 2604.24432; defaults of its section on sizes).

    The decoder reads the last window of its hidden states, and of everything older only the summaries.
    """

    preset: str | None = None  # history length (model/presets.py) that the other fields were filled for
    width: int = 128
    heads: int = 4
    kv_groups: int | None = None  # None = heads
    layers: tuple[Literal["ksa", "full"], ...] = ("ksa", "ksa", "ksa", "full")  # full: causal attention over all text
    chunk: int = 8  # events (or codes, with flatten_codes) that one set of summary tokens stands for
    summaries: int = 1  # summary tokens of a chunk; 0 = sliding-chunk attention, which forgets what leaves the window
    window: int = 128  # earlier chunks that are read as they are, besides the own one
    blend: float = 1.0  # of the summary tokens' own projections; 1 - blend of the text's. 0 = shared, no own ones
    bypass_full: bool = False  # summary tokens skip the full layers
    qk_norm: bool = True
    rope_base: float = 10_000.0
    d_ff: int | None = None  # None = 4 * width
    kernel: Literal["auto", "blocked", "flex"] = "auto"  # auto = flex on a GPU, blocked elsewhere

    def __post_init__(self) -> None:
        least_of = {"width": 1, "heads": 1, "groups": 1, "chunk": 1, "summaries": 0, "window": 0, "ffn_width": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                shown = {"groups": "kv_groups", "ffn_width": "d_ff"}.get(name, name)
                raise ValueError(f"summary attention: {shown} is {getattr(self, name)}; it is at least {least}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"summary attention: width {self.width} is not a multiple of 2 * heads {2 * self.heads}, which its "
                "rotary positions need"
            )
        if self.heads % self.groups:
            raise ValueError(f"summary attention: heads {self.heads} is not a multiple of kv_groups {self.groups}")
        if not self.layers:
            raise ValueError("summary attention: layers is empty; for example [ksa, ksa, ksa, full]")
        if not 0 <= self.blend <= 1:
            raise ValueError(f"summary attention: blend is {self.blend}; it is in [0, 1]")
        if self.rope_base <= 1:
            raise ValueError(f"summary attention: rope_base is {self.rope_base}; it is above 1")

    @property
    def groups(self) -> int:
        """KV groups with their default resolved."""
        return self.heads if self.kv_groups is None else self.kv_groups

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """Hidden width of the SwiGLU FFN."""
        return 4 * self.width if self.d_ff is None else self.d_ff

    @property
    def own_projections(self) -> bool:
        """Whether layers of summary attention have summary tokens with projections of their own."""
        return "ksa" in self.layers and self.projects_summaries("ksa")

    def projects_summaries(self, kind: str) -> bool:
        """Whether the summary tokens of layers of this kind have projections of their own."""
        return self.summaries > 0 and self.blend > 0 and not (kind == "full" and self.bypass_full)


@dataclass(frozen=True)
class ConversionOptions:
    """A stage of the conversion of a model of full attention to summary attention (KSA, section 7.1).

    distil trains the summary embedding and the summary projections alone, against the same network with full
    attention; anneal trains everything while the summary projections give way to the text's.
    """

    stage: Literal["none", "distil", "anneal"] = "none"
    ce: float = 1.0  # distil: factor of the training loss ...
    kl: float = 5.0  # ... of KL(teacher || student) over the codes, mean over levels
    mse: float = 5.0  # ... of the squared error of attention outputs, mean over layers of summary attention
    mse_clip: float = 0.1  # most that one element's squared error counts; beyond it has no gradient
    mse_rms: bool = False  # both attention outputs are scaled to a root mean square of 1 first
    anneal_from: int = 0  # anneal: the step, counted from 0, with the last blend of 1 ...
    anneal_to: int | None = None  # ... and the first step with blend 0; linear in between. Required

    def __post_init__(self) -> None:
        for name in ("ce", "kl", "mse", "anneal_from"):
            if getattr(self, name) < 0:
                raise ValueError(f"conversion.{name} is {getattr(self, name)}; it is at least 0")
        if self.mse_clip <= 0:
            raise ValueError(f"conversion.mse_clip is {self.mse_clip}; it is above 0")
        if self.stage == "distil" and self.ce == self.kl == self.mse == 0:
            raise ValueError("conversion.ce, kl and mse are all 0; distillation needs one of them")
        if self.stage == "anneal" and (self.anneal_to is None or self.anneal_to <= self.anneal_from):
            raise ValueError(
                f"conversion.anneal_from is {self.anneal_from} and anneal_to {self.anneal_to}; the blend falls from 1 "
                "to 0 between two steps, the second after the first"
            )

    def blend(self, step: int) -> float:
        """Weight of the summary tokens' own projections in optimizer step `step`, counted from 0, while annealing."""
        assert self.anneal_to is not None
        return min(1.0, max(0.0, (self.anneal_to - step) / (self.anneal_to - self.anneal_from)))


@dataclass(frozen=True)
class MTPOptions:
    """Sequential multi-token prediction (OneLive, section 3.5): one lite module for each level after the first."""

    enabled: bool = False
    decay: float = 0.5  # loss weight of module k is decay^k (assumption: 1, 0.5, 0.25)
    attend_bos: bool = True  # lite self-attention also sees BOS's keys of the first block (assumption)

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"model.mtp.decay is {self.decay}; it is in (0, 1]: later modules weigh less")


@dataclass(frozen=True)
class ContrastiveOptions:
    """In-batch contrastive loss between the state after the last code and the item tower (OneMall, section 4).

    Everything but the two towers is an assumption: InfoNCE on unit vectors, gradients through both sides.
    """

    weight: float = 0.0  # 0 = no contrastive loss; the paper adds it with weight 1
    temperature: float = 0.07
    logq: bool = True  # subtract the log of an item's share of the training events from its logit
    features: tuple[str, ...] = ("sid", "item")  # of the item, one token each for the item-side Query-Former
    query_former: QueryFormerOptions = field(default_factory=lambda: QueryFormerOptions(queries=4, blocks=1))

    def __post_init__(self) -> None:
        if self.weight < 0 or self.temperature <= 0:
            raise ValueError(
                f"model.contrastive has weight {self.weight} and temperature {self.temperature}; "
                "the weight is at least 0, the temperature above 0"
            )
        _check_distinct("model.contrastive.features", self.features)
        if not self.features:
            raise ValueError("model.contrastive.features is empty; the item tower needs one, for example [sid]")


@dataclass(frozen=True)
class MoEOptions:
    """Sparse experts in place of the FFN (OneRec-V2, section 2.4; DeepSeek-V3 routing)."""

    experts: int = 0  # routed experts; 0 = dense
    top_k: int = 2
    shared: int = 0  # experts that every token uses
    d_expert: int | None = None  # hidden width of an expert; None = model.d_ff
    first_dense: int = 0  # blocks at the bottom that keep a dense FFN
    score: Literal["sigmoid", "softmax"] = "sigmoid"  # assumption
    renormalise: bool = True  # weights of the chosen experts sum to 1 (assumption)
    scale: float = 1.0  # times the weights of the chosen experts (DeepSeek-V3's routed scaling factor)
    groups: int = 1  # equal groups of experts (group-limited routing) ...
    top_groups: int = 1  # ... of which a token may use so many
    bias_rate: float = 0.001  # loss-free balancing: step of an expert's bias per optimizer step; 0 = off
    sequence_loss: float = 0.0  # weight of the balance loss within a target's tokens (DeepSeek-V3, eq. 17)
    z_loss: float = 0.0  # weight of the router z-loss (ST-MoE)

    def __post_init__(self) -> None:
        least_of = {"experts": 0, "top_k": 1, "shared": 0, "first_dense": 0, "groups": 1, "top_groups": 1}
        least_of |= {"bias_rate": 0, "sequence_loss": 0, "z_loss": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"model.moe.{name} is {getattr(self, name)}; it is at least {least}")
        if self.scale <= 0:
            raise ValueError(f"model.moe.scale is {self.scale}; it is above 0")
        if self.d_expert is not None and self.d_expert < 1:
            raise ValueError(f"model.moe.d_expert is {self.d_expert}; it is at least 1")
        if self.experts and self.top_k > self.experts:
            raise ValueError(f"model.moe.top_k {self.top_k} is more than model.moe.experts {self.experts}")
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"model.moe.groups {self.groups} must divide model.moe.experts {self.experts}, and "
                f"model.moe.top_groups {self.top_groups} be at most model.moe.groups"
            )
        eligible = self.top_groups * self.experts // self.groups
        if self.experts and self.top_k > eligible:
            raise ValueError(
                f"model.moe.top_k {self.top_k} is more than the {eligible} experts of model.moe.top_groups groups"
            )


@dataclass(frozen=True)
class ModelOptions:
    """One decoder over one context, in the forms of OneRec-V2, OneMall and OneLive, and two reference architectures.

    Defaults are the dense OneRec-V2 lazy decoder (arXiv 2508.20900, section 2). Those marked "assumption" are not in
    the paper; each is the most standard choice.
    """

    preset: str | None = None  # published size (model/presets.py) that the other fields were filled from
    preset_scale: float = 1.0  # the preset's width, depth and experts times this, for tests; in (0, 1]
    # encoder_decoder: self-attention over the context first (OneRec-V1, TIGER); decoder_only: context and target are
    # one causal sequence
    architecture: Literal["lazy_decoder", "encoder_decoder", "decoder_only"] = "lazy_decoder"
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int | None = None  # None = 4 * d_model, the width that matches every published size
    encoder_layers: int = 0  # of encoder_decoder
    # shared_kv: the context is keys and values, unprojected (OneRec-V2); projected_kv: W_k and W_v in every block
    cross_attention: Literal["shared_kv", "projected_kv"] = "shared_kv"
    l_kv: int = 1  # shared_kv: distinct context KV sets shared across layers
    s_kv: int = 1  # shared_kv: 1 = key and value are one tensor, 2 = separate
    g_kv: int | None = None  # KV head groups of cross-attention; None = n_heads
    qk_norm: bool = False  # RMSNorm of queries and projected keys per head (OneLive, section 3.4)
    output_gate: bool = False  # sigmoid gate on attention outputs (OneLive, section 3.2)
    gate_bias: float | None = None  # initial value of a bias inside the gate; None = no bias (assumption)
    embed_dim: int = 64  # width of a feature's embedding (Table 5), where feature_widths names no other
    features: tuple[str, ...] = ("sid",)  # of an event, concatenated
    user_features: tuple[str, ...] = ()  # of the user-static pathway; empty = one learned vector
    feature_widths: dict[str, int] = field(default_factory=dict)
    hashed: dict[str, int] = field(default_factory=dict)  # feature: rows of its table, ids are hashed into them
    pathway_projection: Literal["linear", "mlp"] = "linear"  # linear (V2, figure 4), or Dense-LeakyReLU-Dense (V1)
    query_formers: dict[str, QueryFormerOptions] = field(default_factory=dict)  # pathway: its compression
    ksa: dict[str, KSAOptions] = field(default_factory=dict)  # pathway: its stack of summary attention
    position: Literal["absolute", "recency", "none"] = "absolute"  # assumption: learned positions
    flatten_codes: bool = False  # encoder_decoder, decoder_only: one position per SID code, not per event (TIGER)
    time_aware: bool = False  # add MLP(time) to history events and to BOS (OneLive, section 3.2)
    time_features: tuple[str, ...] = ("hour", "weekday", "weekend")
    scenario_bos: bool = False  # add an embedding of the request's scenario to BOS (assumption)
    scenario_head_bias: bool = False  # bias of every head by the request's scenario (assumption)
    mtp: MTPOptions = field(default_factory=MTPOptions)
    contrastive: ContrastiveOptions = field(default_factory=ContrastiveOptions)
    moe: MoEOptions = field(default_factory=MoEOptions)
    dropout: float = 0.0
    context_dropout: float = 0.0  # share of context events hidden while training
    init_std: float = 0.02
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "kv_groups", "ffn_width", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{FIELD_OF.get(name, name)} is {getattr(self, name)}; it is at least 1")
        for name in ("feature_widths", "hashed"):
            for feature, size in getattr(self, name).items():
                if size < 1:
                    raise ValueError(f"model.{name} gives {feature} {size}; it is at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}")
        if self.n_heads % self.kv_groups:
            raise ValueError(f"model.n_heads {self.n_heads} is not a multiple of model.g_kv {self.kv_groups}")
        if self.s_kv not in (1, 2):
            raise ValueError(f"model.s_kv is {self.s_kv}; it is 1 (one tensor for key and value) or 2 (separate)")
        if not 1 <= self.l_kv <= self.n_layers:
            raise ValueError(f"model.l_kv is {self.l_kv}; it is between 1 and model.n_layers ({self.n_layers})")
        for name in ("features", "user_features", "time_features"):
            _check_distinct(f"model.{name}", getattr(self, name))
        if not self.features:
            raise ValueError("model.features is empty; the context needs at least one feature, for example [sid]")
        both = sorted({*self.query_formers} & {*self.ksa})
        if both:
            raise ValueError(f"model.query_formers and model.ksa both name the pathway {both[0]!r}; leave one out")
        for name in ("dropout", "context_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it is in [0, 1)")
        self._check_architecture()

    def _check_architecture(self) -> None:
        kind = self.architecture
        if (kind == "encoder_decoder") != (self.encoder_layers > 0):
            raise ValueError(
                f"model.architecture is {kind} with model.encoder_layers {self.encoder_layers}; encoder_decoder has at "
                "least 1, the others have 0"
            )
        if kind == "encoder_decoder" and self.cross_attention != "projected_kv":
            raise ValueError("model.architecture encoder_decoder needs model.cross_attention projected_kv")
        if (self.cross_attention == "projected_kv" or kind == "decoder_only") and (self.l_kv, self.s_kv) != (1, 1):
            raise ValueError("model.l_kv and model.s_kv shape the shared_kv attention of a lazy_decoder; leave them 1")
        if self.flatten_codes and (kind == "lazy_decoder" or "sid" not in self.features):
            raise ValueError(
                "model.flatten_codes is for encoder_decoder and decoder_only, with sid among model.features"
            )
        if kind == "decoder_only":
            for name, plain in (("mtp.enabled", self.mtp.enabled), ("contrastive.weight", self.contrastive.weight)):
                if plain:
                    raise ValueError(f"model.architecture decoder_only is a plain reference without model.{name}")
        if self.moe.experts and self.moe.first_dense >= self.n_layers:
            raise ValueError(
                f"model.moe.first_dense {self.moe.first_dense} leaves none of model.n_layers {self.n_layers} to experts"
            )
        if self.gate_bias is not None and not self.output_gate:
            raise ValueError("model.gate_bias needs model.output_gate: true")
        if self.time_aware and not self.time_features:
            raise ValueError("model.time_aware needs at least one of model.time_features, for example [hour]")

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
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self.ffn_width if self.moe.d_expert is None else self.moe.d_expert

    @property
    def d_context(self) -> int:
        """Width of one context position: S_kv * L_kv * G_kv * d_head for shared_kv, else d_model."""
        if self.cross_attention == "projected_kv" or self.architecture == "decoder_only":
            return self.d_model
        return self.s_kv * self.l_kv * self.kv_groups * self.d_head

    def width_of(self, feature: str) -> int:
        """Width of one feature's embedding."""
        return self.feature_widths.get(feature, self.embed_dim)

    def is_sparse(self, block: int) -> bool:
        """Whether block `block` (from 0) has experts."""
        return self.moe.experts > 0 and block >= self.moe.first_dense


@dataclass(frozen=True)
class Vocabulary:
    """Sizes that come from the data, not from the configuration."""

    codes: tuple[int, ...]  # V of each SID level
    features: dict[str, int | None]  # id space of every feature of an event or item; None = unbounded, to be hashed
    pathways: dict[str, int]  # longest sequence of each behaviour pathway, in events
    user_features: dict[str, int | None] = field(default_factory=dict)

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
