"""`model.preset` in configuration files: what wins over what, and that a saved configuration says the same again."""

from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onetrain.launcher.config import check, load_config, save_config
from onetrain.launcher.config_yaml import parse_yaml
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.model.options import KSAOptions, ModelOptions, MoEOptions, QueryFormerOptions
from onetrain.model.presets import PRESETS, STACKS, preset

START = """name: small
data: {prepared: /prepared}
batch: {pathways: {history: {}, exposure: {}, click: {}, buy: {}, gift: {}}}
"""


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "job.yaml"
        path.write_text(START + text, encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_preset_alone_is_the_published_size(load, name, scale):
    assert load(f"model: {{preset: {name}, preset_scale: {scale}}}").model == preset(name, scale)


def test_the_file_wins_over_the_preset_key_by_key(load):
    model = load("model: {preset: onerec_v2_4b_a0.5b, n_layers: 3, moe: {experts: 7}, d_ff: null}").model
    expected = preset("onerec_v2_4b_a0.5b")
    assert model == replace(expected, n_layers=3, moe=replace(expected.moe, experts=7))


def test_a_mapping_in_the_file_replaces_the_presets(load):
    model = load("model: {preset: onemall_0.1b, query_formers: {click: {queries: 5}}}").model
    assert model.query_formers == {"click": QueryFormerOptions(queries=5)}
    assert load("model: {preset: onemall_0.1b, query_formers: {}}").model.query_formers == {}


def test_an_override_changes_one_key_of_the_preset(load):
    text = "model: {preset: onemall_0.1b}"
    formers = load(text, "model.query_formers.click.queries=5").model.query_formers
    expected = preset("onemall_0.1b").query_formers
    assert formers == {**expected, "click": replace(expected["click"], queries=5)}
    sparse = load("model: {preset: onemall_0.5b_a0.1b}", "model.moe={top_k: 1}").model.moe
    assert sparse == MoEOptions(experts=12, top_k=1, d_expert=4096)


def test_the_preset_itself_may_be_overridden(load):
    text = "model: {preset: onerec_v2_1b, d_ff: 99, n_heads: 14}"
    assert load(text, "model.preset=onerec_v2_8b").model == replace(preset("onerec_v2_8b"), d_ff=99)
    assert load(text, "model.preset_scale=0.1").model == replace(preset("onerec_v2_1b", 0.1), d_ff=99)
    assert load(text, "model.preset=null").model == ModelOptions(d_ff=99)
    assert load("", "model.preset=onerec_v2_8b").model == preset("onerec_v2_8b")


def test_a_saved_configuration_takes_another_preset_and_keeps_what_was_changed(load, tmp_path):
    saved = tmp_path / "run" / "config.yaml"
    save_config(load("model: {preset: onerec_v2_1b, dropout: 0.1}"), saved)
    assert load_config(saved, ["model.preset=onemall_0.1b"]).model == replace(preset("onemall_0.1b"), dropout=0.1)


def test_a_saved_configuration_holds_every_field(load, tmp_path):
    saved = tmp_path / "run" / "config.yaml"
    config = load("model: {preset: onemall_0.5b_a0.1b, preset_scale: 0.1}")
    save_config(config, saved)
    tree = parse_yaml(saved.read_text(), "saved")["model"]
    assert tree.keys() == asdict(config.model).keys()
    assert (tree["preset"], tree["d_model"]) == ("onemall_0.5b_a0.1b", config.model.d_model)


changes = st.fixed_dictionaries(
    {},
    optional={
        "n_layers": st.integers(2, 9),
        "dropout": st.floats(0, 0.9),
        "moe": st.fixed_dictionaries({}, optional={"first_dense": st.integers(0, 2), "renormalise": st.booleans()}),
        "mtp": st.fixed_dictionaries({}, optional={"enabled": st.booleans()}),
        "query_formers": st.dictionaries(st.sampled_from(["click", "gift"]), st.just({"queries": 3})),
        "features": st.lists(st.sampled_from(["sid", "item", "gap"]), min_size=1, unique=True),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(list(PRESETS)),
    scale=st.sampled_from([1.0, 0.3, 0.05]),
    change=changes,
    overrides=st.lists(st.sampled_from(["model.moe={}", "model.embed_dim=8", "model.preset_scale=0.2"]), unique=True),
)
def test_saved_configurations_with_a_preset_load_back_equal(load, tmp_path, name, scale, change, overrides):
    config = load(f"model: {{preset: {name}, preset_scale: {scale}, **}}".replace(", **", _inline(change)), *overrides)
    saved = tmp_path / "saved" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert load_config(saved, [f"model.preset={name}"]) == config


def _inline(change):
    import json

    return "".join(f", {key}: {json.dumps(value)}" for key, value in change.items())


def test_an_unknown_preset_is_answered_with_the_nearest(load):
    with pytest.raises(ConfigError, match=r"(?s)1 problem\n.*did you mean onerec_v2_1b\?"):
        load("model: {preset: onerec_v2_1}")
    with pytest.raises(ConfigError, match=r"did you mean onemall_0.1b\?"):
        load("", "model.preset=onemal_0.1b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {preset: onerec_v2_1b, preset_scale: 0}", "preset_scale is 0; it is in"),
        ("model: {preset: onerec_v2_1b, preset_scale: 2.0}", "preset_scale is 2.0; it is in"),
        ("model: {preset_scale: 0.5}", "there is no model.preset to scale"),
        ("model: {preset: 3}", "model.preset: given 3"),
        ("model: {preset: onerec_v2_1b, preset_scale: true}", "model.preset_scale: given true"),
        ("model: {preset: onerec_v2_1b, n_heads: 13}", "1792 is not a multiple of model.n_heads 13"),
        ("model: {preset: onemall_0.1b, moe: 3}", "model.moe: given 3"),
    ],
)
def test_what_does_not_fit_is_named_once(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).count(message) == 1
    assert "1 problem\n" in str(caught.value)


def test_check_knows_presets_of_configurations_made_in_code():
    config = RunConfig("a", model=ModelOptions(preset="onerec"))
    with pytest.raises(ConfigError, match="there is no preset 'onerec'"):
        check(config, needs_data=False)


@pytest.mark.parametrize("name", STACKS)
def test_one_line_makes_a_lifelong_pathway(load, name):
    ksa = load(f"model: {{ksa: {{history: {{preset: {name}}}}}}}").model.ksa
    assert ksa == {"history": STACKS[name]}
    assert STACKS[name] != KSAOptions(preset=name) or name == "10k"  # the paper's sizes are the defaults


def test_keys_beside_the_preset_of_a_stack_win(load, tmp_path):
    text = "model: {preset: onerec_v2_1b, ksa: {history: {preset: 2k, width: 64}, buy: {chunk: 3}}}"
    config = load(text, "model.ksa.history.window=5")
    expected = {"history": replace(STACKS["2k"], width=64, window=5), "buy": KSAOptions(chunk=3)}
    assert config.model.ksa == expected
    saved = tmp_path / "run" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    longer = load_config(saved, ["model.ksa.history.preset=100k"]).model.ksa
    assert longer == {**expected, "history": replace(STACKS["100k"], width=64, window=5)}
    plain = load_config(saved, ["model.ksa.history.preset=null"]).model.ksa
    assert plain["history"] == KSAOptions(width=64, window=5)


@pytest.mark.parametrize("preset", ["1k", "''"])
def test_an_unknown_preset_of_a_stack_is_named(load, preset):
    with pytest.raises(ConfigError, match=r"model.ksa.history.preset: .*2k, 10k, 100k"):
        load(f"model: {{ksa: {{history: {{preset: {preset}}}}}}}")
    config = RunConfig("a", model=ModelOptions(ksa={"history": KSAOptions(preset="1k")}))
    with pytest.raises(ConfigError, match=r"model.ksa.history.preset: .*2k, 10k, 100k"):
        check(config, needs_data=False)


@pytest.mark.parametrize("ksa", ["3", "[]", "{history: 3}", "{history: []}", "{history: {preset: 3}}"])
def test_what_is_no_section_of_stacks_is_refused(load, ksa):
    with pytest.raises(ConfigError, match=r"model.ksa"):
        load(f"model: {{ksa: {ksa}}}", "train.steps=3")
