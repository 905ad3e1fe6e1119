"""Closed-form parameter counts against models built on the meta device, and against the papers' sizes."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from onetrain.model.build import build
from onetrain.model.options import (
    ContrastiveOptions,
    ModelOptions,
    MoEOptions,
    MTPOptions,
    QueryFormerOptions,
    Vocabulary,
)
from onetrain.model.parameter_counts import PARTS, parameter_counts
from onetrain.model.presets import PRESETS, find, preset, vocabulary


def built(options, vocab):
    with torch.device("meta"):
        return build(options, vocab)


def counted(model):
    """(parameters by part, those of routed experts) of a built model."""
    tables = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ".head_biases." not in name
    }
    parts, routed = Counter(), 0
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        group = name.removeprefix("tokens.").split(".")[0]
        if owner in tables:
            part = "embeddings"
        elif group == "blocks":
            part = {"cros": "cross", "self": "self", "ffn": "ffn", "ffn_": "ffn"}[name.split(".")[2][:4]]
        else:
            known = {"context": "context", "bos_time": "context", "encoder": "encoder", "mtp": "mtp"}
            known |= {"norms": "heads", "heads": "heads", "head_biases": "heads"}
            part = (known | {"item_tower": "contrastive", "state_norm": "contrastive"})[group]
        parts[part] += parameter.numel()
        if part == "ffn" and parameter.dim() == 3:
            routed += parameter.numel()
    return dict(parts), routed


def assert_equal(options, vocab):
    counts = parameter_counts(options, vocab)
    parts, routed = counted(built(options, vocab))
    assert counts.total_by_part == {part: parts.get(part, 0) for part in PARTS}
    assert counts.total == sum(parts.values())
    unused = routed * (options.moe.experts - options.moe.top_k) // options.moe.experts if routed else 0
    assert counts.active == counts.total - unused


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_every_preset_is_built_on_meta_and_counted_exactly(name, scale):
    assert_equal(preset(name, scale), vocabulary(name, scale))


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
            first_dense=draw.randint(0, n_layers) if experts else 0,
        ),
    )
    vocab = Vocabulary(
        codes=tuple(draw.randint(2, 9) for _ in range(draw.randint(1, 4))),
        features={"item": 23, "behaviour": 3, "scenario": 2, "hour": 24, "weekday": 7},
        pathways={name: draw.randint(1, 8) for name in pathways},
        user_features={"user": None, "age_group": 5},
    )
    return options, vocab


@pytest.mark.parametrize("seed", range(60))
def test_random_options_are_counted_exactly(seed):
    assert_equal(*random_options(seed))


# section 2.4: 18 d^2 a layer, in millions
BLOCKS = {
    "onerec_v2_0.1b": 88.5,
    "onerec_v2_0.2b": 173.4,
    "onerec_v2_0.5b": 499.6,
    "onerec_v2_1b": 1040.4,
    "onerec_v2_2b": 2102.1,
    "onerec_v2_4b": 4056.2,
    "onerec_v2_8b": 7861.2,
}


def norms(options):
    return 3 * options.d_model * options.n_layers


@pytest.mark.parametrize("name", BLOCKS)
def test_onerec_v2_blocks_are_the_nominal_size(name):
    counts = parameter_counts(preset(name), vocabulary(name))
    assert (counts.blocks - norms(preset(name))) / 1e6 == pytest.approx(BLOCKS[name], abs=0.05)
    assert counts.blocks == pytest.approx(find(name).nominal_parameters, rel=0.14)


def test_the_mixture_has_4b_parameters_and_half_a_billion_active_ones():
    options = preset("onerec_v2_4b_a0.5b")
    counts = parameter_counts(options, vocabulary("onerec_v2_4b_a0.5b"))
    routers = 12 * 53 * 1408
    assert (counts.blocks - norms(options) - routers) / 1e9 == pytest.approx(4.068, abs=5e-4)
    assert (counts.active_blocks - norms(options) - routers) / 1e9 == pytest.approx(0.4996, abs=5e-5)


# OneMall's Table 1 against blocks of SwiGLU: total and active, in billions
ONEMALL = {
    "onemall_0.05b": (0.042, 0.042),
    "onemall_0.1b": (0.084, 0.084),
    "onemall_0.5b_a0.1b": (0.638, 0.134),
    "onemall_1.3b_a0.1b": (1.242, 0.134),
}


@pytest.mark.parametrize("name", ONEMALL)
def test_onemall_blocks(name):
    counts = parameter_counts(preset(name), vocabulary(name))
    total, active = ONEMALL[name]
    assert counts.blocks / 1e9 == pytest.approx(total, abs=6e-4)
    assert counts.active_blocks / 1e9 == pytest.approx(active, abs=6e-4)


def test_onelive_with_six_blocks_is_about_0_08b_without_tables():
    counts = parameter_counts(preset("onelive_6l"), vocabulary("onelive_6l"))
    assert counts.total - counts.total_by_part["embeddings"] == pytest.approx(0.08e9, rel=0.07)


def test_what_the_vocabulary_lacks_is_named():
    vocab = replace(vocabulary("onelive_6l"), features={"hour": 24})
    with pytest.raises(ValueError, match="item"):
        parameter_counts(preset("onelive_6l"), vocab)
