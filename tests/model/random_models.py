"""Options of any architecture with any part, drawn at random, and inputs whose sequences are full."""

import random
from dataclasses import replace

import torch

from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.options import (
    ContrastiveOptions,
    KSAOptions,
    ModelOptions,
    MoEOptions,
    MTPOptions,
    QueryFormerOptions,
    Vocabulary,
)

FEATURES = ("sid", "item", "behaviour", "scenario", "hour", "weekday")


def random_options(seed):
    """Options of any architecture with any part, and a vocabulary for them."""
    draw = random.Random(seed)
    flag = lambda: draw.random() < 0.5  # noqa: E731
    architecture = draw.choice(["lazy_decoder", "lazy_decoder", "encoder_decoder", "decoder_only"])
    plain = architecture == "decoder_only"
    projected = architecture == "encoder_decoder" or (not plain and flag())
    n_heads, n_layers = draw.choice([1, 2, 4]), draw.randint(1, 4)
    gated, experts, pathways = (
        flag(),
        draw.choice([0, 0, 3, 5]),
        draw.sample(["short", "long", "buy"], draw.randint(1, 3)),
    )
    shapes_kv = architecture == "lazy_decoder" and not projected
    flatten = architecture != "lazy_decoder" and flag()
    features = draw.sample(FEATURES, draw.randint(1, 4))

    def former():
        return QueryFormerOptions(
            draw.randint(1, 5), 4 * draw.randint(1, 4), draw.randint(1, 3), 2, draw.choice([None, 9])
        )

    options = ModelOptions(
        architecture=architecture,
        d_model=n_heads * 2 * draw.randint(1, 6),
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=draw.choice([None, 13]),
        encoder_layers=draw.randint(1, 3) if architecture == "encoder_decoder" else 0,
        cross_attention="projected_kv" if projected else "shared_kv",
        l_kv=draw.randint(1, n_layers) if shapes_kv else 1,
        s_kv=draw.choice([1, 2]) if shapes_kv else 1,
        g_kv=draw.choice([None, 1, n_heads]),
        qk_norm=flag(),
        output_gate=gated,
        gate_bias=2.0 if gated and flag() else None,
        embed_dim=draw.randint(1, 9),
        features=tuple(dict.fromkeys(["sid", *features])) if flatten else tuple(features),
        user_features=draw.choice([(), ("user",), ("user", "age_group")]),
        feature_widths={"item": 7} if flag() else {},
        hashed={"user": 19, "item": 6},
        pathway_projection=draw.choice(["linear", "mlp"]),
        query_formers={name: former() for name in pathways if flag()},
        position=draw.choice(["absolute", "recency", "none"]),
        flatten_codes=flatten,
        time_aware=flag(),
        time_features=tuple(draw.sample(["hour", "weekday"], draw.randint(1, 2))),
        scenario_bos=flag(),
        scenario_head_bias=flag(),
        mtp=MTPOptions(enabled=not plain and flag(), attend_bos=flag()),
        contrastive=ContrastiveOptions(
            weight=0.0 if plain or flag() else 1.0,
            features=draw.choice([("sid", "item"), ("item",), ("sid",), ("item", "sid", "behaviour")]),
            query_former=former(),
        ),
        moe=MoEOptions(
            experts=experts,
            top_k=draw.randint(1, 2),
            shared=draw.randint(0, 2),
            d_expert=draw.choice([None, 11]),
            first_dense=draw.randint(0, n_layers - 1) if experts else 0,
        ),
    )
    vocab = Vocabulary(
        codes=tuple(draw.randint(2, 9) for _ in range(draw.randint(1, 4))),
        features={"item": 23, "behaviour": 3, "scenario": 2, "hour": 24, "weekday": 7},
        pathways={name: draw.randint(1, 8) for name in pathways},
        user_features={"user": None, "age_group": 5},
    )
    stacks = {name: random_stack(draw) for name in pathways if name not in options.query_formers and flag()}
    lengths = {name: draw.randint(1, 30) if name in stacks else length for name, length in vocab.pathways.items()}
    return replace(options, ksa=stacks), replace(vocab, pathways=lengths)


def random_stack(draw):
    """Options of a small stack of summary attention."""
    heads = draw.choice([1, 2, 4])
    return KSAOptions(
        width=2 * heads * draw.randint(1, 4),
        heads=heads,
        kv_groups=draw.choice([None, 1, heads]),
        layers=tuple(draw.choice(["ksa", "ksa", "full"]) for _ in range(draw.randint(1, 3))),
        chunk=draw.randint(1, 5),
        summaries=draw.randint(0, 3),
        window=draw.randint(0, 4),
        blend=draw.choice([0.0, 0.4, 1.0, 1.0]),
        bypass_full=draw.random() < 0.3,
        qk_norm=draw.random() < 0.7,
        d_ff=draw.choice([None, 9]),
    )


def full_inputs(options, vocab, rows, slots, seed=0):
    """Sequences of full length and targets that see all of them: nothing is padding."""
    g = torch.Generator().manual_seed(seed)

    def ids(sizes, *shape):
        return {name: torch.randint(size or 1000, shape, generator=g) for name, size in sizes.items()}

    def sids(*shape):
        return torch.stack([torch.randint(size, shape, generator=g) for size in vocab.codes], dim=-1)

    sequences = {
        name: Events(
            sid_BNL=sids(rows, length),
            index_BN=torch.arange(length).expand(rows, -1),
            length_B=torch.full((rows,), length),
            features=ids(vocab.features, rows, length),
        )
        for name, length in vocab.pathways.items()
    }
    targets = Targets(
        sid_BTL=sids(rows, slots),
        end_BT=torch.full((rows, slots), max(vocab.pathways.values())),
        weight_BT=torch.ones(rows, slots),
        request=ids({"scenario": vocab.features.get("scenario"), "hour": 24, "weekday": 7, "weekend": 2}, rows, slots),
        item=ids(vocab.features, rows, slots),
        log_q_BT=torch.zeros(rows, slots),
    )
    return Context(sequences, ids(vocab.user_features, rows)), targets
