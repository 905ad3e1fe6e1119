"""Closed-form parameter counts against models built on the meta device, and against the papers' sizes."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from random_models import random_options
from torch import nn

from onetrain.model.build import build
from onetrain.model.options import KSAOptions, ModelOptions, Vocabulary
from onetrain.model.parameter_counts import PARTS, largest_parameter, parameter_counts
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
        elif ".stack.blocks." in name:
            part = "ksa"
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


@pytest.mark.parametrize("seed", range(60))
def test_random_options_are_counted_exactly(seed):
    assert_equal(*random_options(seed))


def test_random_options_have_stacks_of_every_kind():
    stacks = [ksa for seed in range(60) for ksa in random_options(seed)[0].ksa.values()]
    assert len(stacks) > 20
    assert {ksa.bypass_full for ksa in stacks if "full" in ksa.layers} == {True, False}
    assert {ksa.blend for ksa in stacks} == {0.0, 0.4, 1.0}
    assert any(ksa.summaries == 0 for ksa in stacks)


def test_the_largest_tensor_may_be_one_of_a_stack():
    options = ModelOptions(d_model=8, n_heads=1, n_layers=1, embed_dim=2, ksa={"history": KSAOptions(width=64)})
    vocab = Vocabulary(codes=(4,), features={}, pathways={"history": 9})
    found = max(parameter.numel() for parameter in built(options, vocab).parameters())
    assert largest_parameter(options, vocab) == found == 2 * 64 * 256


@pytest.mark.parametrize("name", PRESETS)
def test_the_largest_tensor_of_every_preset(name):
    model = built(preset(name), vocabulary(name))
    assert largest_parameter(preset(name), vocabulary(name)) == max(p.numel() for p in model.parameters())


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
