"""Published sizes by name: OneRec-V2 (arXiv 2508.20900), OneMall (2601.21770) and OneLive (2602.08612).

A preset is the `model:` section of one published size, with the figures that a plan compares it with. `preset(name,
scale)` shrinks it by one knob, so that a test trains the same architecture in a second. `stack_preset(name)` are the
options of a lifelong pathway's stack for a length of history.
"""

import difflib
from dataclasses import dataclass, field, replace

from onetrain.model.options import (
    ContrastiveOptions,
    KSAOptions,
    ModelOptions,
    MoEOptions,
    MTPOptions,
    QueryFormerOptions,
    Vocabulary,
)


@dataclass(frozen=True)
class Preset:
    """One published size.

    `pathways` are the longest sequences in events; the user-static position, which every model has, is one more.
    """

    options: ModelOptions
    codes: tuple[int, ...]  # per SID level
    pathways: dict[str, int]
    nominal_parameters: float | None = None  # as the paper's name of the size says; None = not published
    active_parameters: float | None = None  # of a mixture of experts, likewise
    learning_rate: float | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # of features beside the SID, for a model without data


# N is about 512 with an unpublished split: one static position, V1's 20 newest and 256 positive events, and the rest
# from the long-term sequence (assumption).
_V2_PATHWAYS = {"short": 20, "positive": 256, "long": 235}


def _onerec_v2(
    nominal: float, d_model: int, n_layers: int, n_heads: int, embed_dim: int, learning_rate: float
) -> Preset:
    """A row of OneRec-V2's Table 5. SwiGLU of 4 * d_model reproduces the nominal counts (section 2.4)."""
    options = ModelOptions(d_model=d_model, n_layers=n_layers, n_heads=n_heads, embed_dim=embed_dim)
    return Preset(options, (8192,) * 3, _V2_PATHWAYS, nominal, None, learning_rate)


def _onerec_v2_moe() -> Preset:
    """The 0.5B trunk with 53 routed experts and 1 shared one, top-3, in all blocks but the first two (section 2.4)."""
    dense = _onerec_v2(5e8, 1408, 14, 11, 70, 2.24e-4)
    moe = MoEOptions(experts=53, top_k=3, shared=1, d_expert=1408, first_dense=2)
    return replace(dense, options=replace(dense.options, moe=moe), nominal_parameters=4e9, active_parameters=5e8)


def _onemall(nominal: float, n_layers: int, experts: int = 0, active: float | None = None) -> Preset:
    """A row of OneMall's Table 1: width 1024, FFN 4096, 8 heads; 3 x 4096 codes; contrastive loss with weight 1.

    Assumptions, where the paper is silent: SwiGLU experts of width 4096 and no shared one; Query-Formers of width 128
    (its example) in 2 blocks, projected to 1024; feature width 64. Table 6 compresses 1205 positions to 160: here 500
    exposures, 500 clicks and 204 purchases, 53 queries each, and the static position.
    """
    queries = QueryFormerOptions(queries=53, width=128, blocks=2, heads=4)
    options = ModelOptions(
        d_model=1024,
        n_layers=n_layers,
        n_heads=8,
        d_ff=4096,
        cross_attention="projected_kv",
        query_formers={name: queries for name in ("exposure", "click", "buy")},
        contrastive=ContrastiveOptions(weight=1.0),
        moe=MoEOptions(experts=experts, top_k=2, d_expert=4096) if experts else MoEOptions(),
    )
    pathways = {"exposure": 500, "click": 500, "buy": 204}
    return Preset(options, (4096,) * 3, pathways, nominal, active, sizes={"item": 1_000_000})


def _onelive(nominal: float | None, n_layers: int) -> Preset:
    """OneLive's decoder (sections 3.1 to 3.5) with 3 or 6 main blocks, 3 x 8192 codes, three sequences of 500 events.

    The paper gives no width. Assumption: 640 in 10 heads, as OneRec-V2's 0.1B has; with 6 blocks, two lite modules and
    three heads that is the 0.08B that the paper serves (embedding tables not counted).
    """
    options = ModelOptions(
        d_model=640,
        n_layers=n_layers,
        n_heads=10,
        embed_dim=32,
        features=("sid", "item"),  # the item is the author
        pathway_projection="mlp",
        cross_attention="projected_kv",
        output_gate=True,
        qk_norm=True,
        time_aware=True,
        mtp=MTPOptions(enabled=True),
    )
    pathways = {"view": 500, "gift": 500, "video": 500}
    return Preset(options, (8192,) * 3, pathways, nominal, sizes={"item": 3_000_000})  # 3M authors (section 6)


PRESETS: dict[str, Preset] = {
    "onerec_v2_0.1b": _onerec_v2(1e8, 640, 12, 10, 32, 5e-4),
    "onerec_v2_0.2b": _onerec_v2(2e8, 896, 12, 14, 45, 3.54e-4),
    "onerec_v2_0.5b": _onerec_v2(5e8, 1408, 14, 11, 70, 2.24e-4),
    "onerec_v2_1b": _onerec_v2(1e9, 1792, 18, 14, 90, 1.58e-4),
    "onerec_v2_2b": _onerec_v2(2e9, 2304, 22, 18, 115, 1.12e-4),
    "onerec_v2_4b": _onerec_v2(4e9, 2944, 26, 23, 147, 7.91e-5),
    "onerec_v2_8b": _onerec_v2(8e9, 3584, 34, 28, 179, 5.59e-5),
    "onerec_v2_4b_a0.5b": _onerec_v2_moe(),
    "onemall_0.05b": _onemall(5e7, 2),
    "onemall_0.1b": _onemall(1e8, 4),
    "onemall_0.5b_a0.1b": _onemall(5e8, 4, 12, 1e8),
    "onemall_1.3b_a0.1b": _onemall(1.3e9, 4, 24, 1e8),
    "onelive_3l": _onelive(None, 3),
    "onelive_6l": _onelive(8e7, 6),
}

_FIXED_SIZES = {"hour": 24, "weekday": 7, "weekend": 2}


# Of summary attention (KSA) by the length of history. 10k has the paper's sizes: chunks of 8, a window of 1,024 events,
# three layers of summary attention and a full one. 2k has a window of 256: 1,024 would be half the history. At 100k
# chunks of 32 bound what the decoder reads, the window is 1,024 events again, no layer is full, whose score pairs would
# be six times those of the other three, and the slowest rotary wave is three histories long, as at 10k.
STACKS: dict[str, KSAOptions] = {
    "2k": KSAOptions(preset="2k", chunk=8, window=32),
    "10k": KSAOptions(preset="10k", chunk=8, window=128),
    "100k": KSAOptions(preset="100k", layers=("ksa",) * 4, chunk=32, window=32, rope_base=100_000.0),
}


def stack_preset(name: str) -> KSAOptions:
    """The stack of summary attention for histories of about this length, with `preset` filled in.

    Raises ValueError for an unknown name.
    """
    if name not in STACKS:
        raise ValueError(f"there is no preset {name!r} of summary attention; they are {', '.join(STACKS)}")
    return STACKS[name]


def find(name: str) -> Preset:
    """The preset of that name. Raises ValueError that suggests the nearest name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(PRESETS)}"
        raise ValueError(f"model.preset: there is no preset {name!r}; {hint}")
    return PRESETS[name]


def preset(name: str, scale: float = 1.0) -> ModelOptions:
    """Options of a published size; `scale` below 1 shrinks it to a small model that is legal and keeps every part.

    Scaled: width, layers, FFN, experts, feature widths, and the Query-Formers. At least 2 heads of width 4, 2 layers
    (one of them sparse where the preset has experts) and top_k + 1 experts remain. Not scaled: top_k, shared experts.
    Raises ValueError for an unknown name and for a scale outside (0, 1].
    """
    found = find(name).options
    if not 0 < scale <= 1:
        raise ValueError(f"model.preset_scale is {scale}; it is in (0, 1]")
    if scale < 1:
        found = _scaled(found, scale)
    return replace(found, preset=name, preset_scale=scale)


def vocabulary(name: str, scale: float = 1.0) -> Vocabulary:
    """Sizes of codes, features and pathways with which a preset can be built without data, scaled likewise."""
    found = find(name)
    return Vocabulary(
        codes=tuple(_at_least(8, codes * scale) for codes in found.codes),
        features={**_FIXED_SIZES, **{feature: _at_least(8, size * scale) for feature, size in found.sizes.items()}},
        pathways={pathway: _at_least(4, length * scale) for pathway, length in found.pathways.items()},
    )


def _scaled(options: ModelOptions, scale: float) -> ModelOptions:
    n_heads = max(min(2, options.n_heads), round(options.n_heads * scale**0.5))
    d_head = 2 * _at_least(2, options.d_model * scale / n_heads / 2)
    n_layers = _at_least(min(2, options.n_layers), options.n_layers * scale)
    moe, contrastive = options.moe, options.contrastive
    return replace(
        options,
        d_model=n_heads * d_head,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=None if options.d_ff is None else _at_least(8, options.d_ff * scale),
        embed_dim=_at_least(4, options.embed_dim * scale),
        query_formers={name: _scaled_queries(former, scale) for name, former in options.query_formers.items()},
        contrastive=replace(contrastive, query_former=_scaled_queries(contrastive.query_former, scale)),
        moe=replace(
            moe,
            experts=_at_least(moe.top_k + 1, moe.experts * scale),
            d_expert=None if moe.d_expert is None else _at_least(8, moe.d_expert * scale),
            first_dense=min(moe.first_dense, n_layers - 1),
        )
        if moe.experts
        else moe,
    )


def _scaled_queries(former: QueryFormerOptions, scale: float) -> QueryFormerOptions:
    heads = max(min(2, former.heads), round(former.heads * scale**0.5))
    width = heads * 2 * _at_least(2, former.width * scale / heads / 2)
    return replace(former, queries=_at_least(2, former.queries * scale), width=width, heads=heads)


def _at_least(least: int, value: float) -> int:
    return max(least, round(value))
