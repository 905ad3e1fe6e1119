"""A configuration that extends another says only what differs."""

from pathlib import Path

import pytest

from onetrain.launcher.config import load_config
from onetrain.launcher.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = """
name: base
data: {prepared: /prepared}
batch:
  max_context: 30
  pathways:
    short: {length: 5}
    long: {length: 30, skip: 5}
model:
  d_model: 64
  features: [sid, behaviour]
  query_formers: {long: {queries: 3}}
  moe: {experts: 4, top_k: 1}
"""


@pytest.fixture
def files(tmp_path):
    def files(**texts):
        for name, text in texts.items():
            path = tmp_path / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return files


def test_sections_merge_and_mappings_are_replaced(files):
    folder = files(
        base=BASE,
        child="""
extends: base.yaml
name: child
batch:
  pathways: {only: {length: 7}}
model:
  features: [sid]
  query_formers: {}
  moe: {experts: 8}
""",
    )
    base, child = load_config(folder / "base.yaml"), load_config(folder / "child.yaml")
    assert (child.name, child.batch.pathway_lengths, child.model.query_formers) == ("child", {"only": 7}, {})
    assert child.model.features == ("sid",)
    assert (child.model.moe.experts, child.model.moe.top_k) == (8, 1)
    assert (child.model.d_model, child.batch.max_context) == (base.model.d_model, base.batch.max_context) == (64, 30)
    assert child.data == base.data


def test_chains_and_overrides_and_presets_apply_in_order(files):
    folder = files(
        base=BASE,
        middle="extends: base.yaml\nmodel: {d_model: 128, n_layers: 3}\n",
        child="extends: middle.yaml\nname: child\nmodel: {n_layers: 5}\n",
    )
    config = load_config(folder / "child.yaml", ["model.n_heads=8"])
    assert (config.model.d_model, config.model.n_layers, config.model.n_heads) == (128, 5, 8)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"child": "extends: child.yaml\n"}, "extends itself"),
        ({"child": "extends: other.yaml\n", "other": "extends: child.yaml\n"}, "extends itself"),
        ({"child": "extends: missing.yaml\nname: child\n"}, "missing.yaml: there is no such file"),
        ({"child": "extends: [a, b]\nname: child\n"}, "names one YAML file"),
    ],
)
def test_what_cannot_be_extended_is_named(files, texts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(files(**texts) / "child.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_of_the_project_is_valid(path):
    config = load_config(path, needs_data=False)
    assert config.name
