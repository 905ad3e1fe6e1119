import sys
from dataclasses import replace

import numpy as np
import pytest

from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.shards import read_items
from onetrain.data.sids import SidMap
from onetrain.launcher.options import RunConfig
from onetrain.launcher.tokenize import tokenize
from onetrain.model.options import TokenizerOptions


def simulated(folder, seed):
    shop = SimulatorOptions(users=80, items=120, events_per_user=9, themes=12, embedding_dim=8, seed=seed)
    source = SourceOptions(reader="simulator", events=str(folder / f"logs-{seed}"), simulator=shop)
    options = DataOptions(prepared=str(folder / f"prepared-{seed}"), source=source)
    prepare(options)
    return RunConfig(name="test", data=options, tokenizer=TokenizerOptions(codebook=(12, 4, 8)))


@pytest.fixture
def config(tmp_path):
    return simulated(tmp_path, seed=1)


def test_every_item_gets_a_sid_and_the_manifest_names_the_map(config):
    heard = []
    before = Manifest.load(config.data.prepared)
    report = tokenize(config, lambda *what: heard.append(what))
    manifest = Manifest.load(config.data.prepared)
    sids = SidMap.load(f"{config.data.prepared}/sids")
    assert before.sid_fingerprint is None
    assert manifest == before.with_sid_fingerprint(sids.fingerprint)
    sids.check_against(manifest)
    assert sids.codes_IL.shape == (len(read_items(config.data.prepared)), 3)
    assert sids.sizes == report.after.sizes == (12, 4, 8)
    assert report.after.distinct_sids == len(np.unique(sids.codes_IL, axis=0))
    assert heard == [("fitting codebooks", 0, None)]


def test_again_with_the_same_seed_is_the_same_map(config):
    fingerprints = []
    for seed in (0, 0, 1):
        tokenize(replace(config, seed=seed))
        fingerprints.append(SidMap.load(f"{config.data.prepared}/sids").fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_sids_of_other_items_are_foreign(config, tmp_path):
    tokenize(config)
    other = simulated(tmp_path, seed=2)
    tokenize(other)
    sids = SidMap.load(f"{config.data.prepared}/sids")
    with pytest.raises(DataError, match="foreign"):
        sids.check_against(Manifest.load(other.data.prepared))


@pytest.mark.parametrize("embedding", ["array", "cooccurrence", "array+cooccurrence"])
def test_other_embeddings(config, tmp_path, embedding):
    items = len(read_items(config.data.prepared))
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(items, 5)))
    options = replace(
        config.tokenizer, embedding=embedding, array=str(tmp_path / "rows.npy"), cooccurrence_dim=7, codebook=(6, 30)
    )
    tokenize(replace(config, tokenizer=options))
    width = {"array": 5, "cooccurrence": 7, "array+cooccurrence": 12}[embedding]
    sids = SidMap.load(f"{config.data.prepared}/sids")
    assert [codebook.shape for codebook in sids.codebooks] == [(6, width), (30, width)]


def test_an_extra_level_has_no_codebook(config):
    tokenize(replace(config, tokenizer=TokenizerOptions(codebook=(4, 4), collisions="extra_level")))
    sids = SidMap.load(f"{config.data.prepared}/sids")
    assert (len(sids.sizes), len(sids.codebooks)) == (3, 2)
    assert len(np.unique(sids.codes_IL, axis=0)) == len(sids.codes_IL)


def test_a_codebook_larger_than_the_catalogue_is_a_data_error(config):
    tokenizer = replace(config.tokenizer, codebook=(12, 500))
    with pytest.raises(DataError, match="more codes than there are items"):
        tokenize(replace(config, tokenizer=tokenizer))
    assert Manifest.load(config.data.prepared).sid_fingerprint is None


def test_text_without_the_extra_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    tokenizer = replace(config.tokenizer, embedding="text")
    with pytest.raises(DataError, match=r"onetrain\[text\]"):
        tokenize(replace(config, tokenizer=tokenizer))
