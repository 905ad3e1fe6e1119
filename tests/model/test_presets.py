"""Presets against the papers' tables, and what the one knob leaves of them."""

import itertools

import pytest

from onetrain.model.presets import PRESETS, find, preset, vocabulary

# OneRec-V2, Table 5: d_model, layers, heads, embed_dim, learning rate
TABLE_5 = {
    "onerec_v2_0.1b": (640, 12, 10, 32, 5.00e-4),
    "onerec_v2_0.2b": (896, 12, 14, 45, 3.54e-4),
    "onerec_v2_0.5b": (1408, 14, 11, 70, 2.24e-4),
    "onerec_v2_1b": (1792, 18, 14, 90, 1.58e-4),
    "onerec_v2_2b": (2304, 22, 18, 115, 1.12e-4),
    "onerec_v2_4b": (2944, 26, 23, 147, 7.91e-5),
    "onerec_v2_8b": (3584, 34, 28, 179, 5.59e-5),
    "onerec_v2_4b_a0.5b": (1408, 14, 11, 70, 2.24e-4),
}
# OneMall, Table 1: layers, experts (2 active)
TABLE_1 = {
    "onemall_0.05b": (2, 0),
    "onemall_0.1b": (4, 0),
    "onemall_0.5b_a0.1b": (4, 12),
    "onemall_1.3b_a0.1b": (4, 24),
}


@pytest.mark.parametrize("name", TABLE_5)
def test_onerec_v2_is_table_5(name):
    found = preset(name)
    row = (found.d_model, found.n_layers, found.n_heads, found.embed_dim, find(name).learning_rate)
    assert row == TABLE_5[name]
    assert found.ffn_width == 4 * found.d_model
    assert found.embed_dim == round(found.d_model / 20)
    nominal = find(name).active_parameters or find(name).nominal_parameters
    assert find(name).learning_rate == pytest.approx(5e-4 * (1e8 / nominal) ** 0.5, rel=2e-3)
    assert sum(find(name).pathways.values()) + 1 == 512


@pytest.mark.parametrize("name", TABLE_1)
def test_onemall_is_table_1(name):
    found = preset(name)
    assert (found.n_layers, found.moe.experts) == TABLE_1[name]
    assert (found.d_model, found.ffn_width, found.n_heads) == (1024, 4096, 8)
    if found.moe.experts:
        assert (found.moe.top_k, found.moe.shared, found.expert_width) == (2, 0, 4096)


def test_onemall_compresses_1205_positions_to_160():
    found = find("onemall_0.5b_a0.1b")
    assert 1 + sum(found.pathways.values()) == 1205
    assert 1 + sum(former.queries for former in found.options.query_formers.values()) == 160
    assert found.options.query_formers.keys() == found.pathways.keys()


@pytest.mark.parametrize("layers", [3, 6])
def test_onelive_has_every_part_of_its_decoder(layers):
    found = preset(f"onelive_{layers}l")
    assert found.n_layers == layers
    assert found.output_gate
    assert found.qk_norm
    assert found.time_aware
    assert found.mtp.enabled
    assert found.cross_attention == "projected_kv"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 0.02, 1e-6])
def test_one_knob_leaves_a_legal_model_with_every_part(name, scale):
    full, small = preset(name), preset(name, scale)
    assert (small.preset, small.preset_scale) == (name, scale)
    assert small.d_head % 2 == 0
    assert (small.moe.experts > 0) == (full.moe.experts > 0)
    if small.moe.experts:
        assert any(small.is_sparse(block) for block in range(small.n_layers))
        assert (full.moe.first_dense > 0) == (not small.is_sparse(0))
        assert small.moe.top_k == full.moe.top_k < small.moe.experts
    assert small.query_formers.keys() == full.query_formers.keys()
    assert small.features == full.features
    sizes = vocabulary(name, scale)
    assert set(small.features) - {"sid"} <= sizes.features.keys()
    assert sizes.levels == 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_smaller_scale_is_never_larger(name):
    scales = [1.0, 0.7, 0.5, 0.25, 0.1, 0.05, 0.01]
    sizes = [(p.n_layers, p.d_model, p.moe.experts, p.embed_dim) for p in (preset(name, scale) for scale in scales)]
    for larger, smaller in itertools.pairwise(sizes):
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
    assert preset(name, 0.1).d_model <= 0.12 * preset(name).d_model


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5])
def test_a_scale_that_does_not_shrink_is_refused(scale):
    with pytest.raises(ValueError, match="preset_scale"):
        preset("onerec_v2_1b", scale)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean onerec_v2_8b\?"):
        preset("onerec-v2-8b")
    with pytest.raises(ValueError, match="they are onerec_v2_0"):
        preset("zzz")
