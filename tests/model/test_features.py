"""Feature tables: hashing, widths, unknown names."""

import pytest
import torch
from decoder_cases import check_variant, variant
from reference_layers import hashed_row

from onetrain.model.build import build
from onetrain.model.features import FeatureTables, hash_ids
from onetrain.model.inputs import Context, Events
from onetrain.model.options import ModelOptions, Vocabulary


@pytest.mark.parametrize("rows", [1, 7, 1000, 2**31 + 11])
def test_hashing_equals_whole_number_arithmetic(rows):
    g = torch.Generator().manual_seed(0)
    ids = torch.cat(
        (
            torch.arange(50),
            torch.randint(-(2**63), 2**63 - 1, (200,), generator=g),
            torch.tensor([2**63 - 1, -(2**63), 0, -1, 2**32]),
        )
    )
    assert hash_ids(ids, rows).tolist() == [hashed_row(int(identity), rows) for identity in ids]


@pytest.mark.parametrize("ids", ["consecutive", "multiples", "random"])
def test_hashed_ids_spread_evenly(ids):
    """Also ids that share low or high bits: about ids / rows in every row."""
    values = {
        "consecutive": torch.arange(64_000),
        "multiples": torch.arange(64_000) * 4096,
        "random": torch.randint(2**62, (64_000,), generator=torch.Generator().manual_seed(0)),
    }[ids]
    counts = torch.bincount(hash_ids(values, 64), minlength=64)
    assert counts.min() / 1000 > 0.7
    assert counts.max() / 1000 < 1.3
    assert torch.equal(hash_ids(values, 64), hash_ids(values.clone(), 64))


def test_equal_ids_share_a_row_and_its_gradient():
    options = ModelOptions(hashed={"author": 3}, feature_widths={"author": 2, "item": 5})
    tables = FeatureTables(["author", "item"], {"author": None, "item": 4}, options)
    assert tables.width == 7
    assert {name: tuple(table.weight.shape) for name, table in tables.tables.items()} == {
        "author": (3, 2),
        "item": (4, 5),
    }
    author = torch.tensor([2**60, 5, 2**60])
    out = tables({"author": author, "item": torch.tensor([0, 3, 3])})
    assert torch.equal(out[0, :2], out[2, :2])
    assert torch.equal(out[1, 2:], out[2, 2:])
    out[[0, 2], :2].sum().backward()
    row = hashed_row(2**60, 3)
    assert tables.tables["author"].weight.grad[row].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ("sid", "itme")}, "itme.*Did you mean 'item'"),
        ({"features": ("author",)}, "unbounded.*model.hashed.author"),
        ({"user_features": ("user",)}, "unbounded.*model.hashed.user"),
        ({"user_features": ("item",)}, "'item'; the data have user, group"),
        ({"time_aware": True, "time_features": ("hours",)}, "hours.*Did you mean 'hour'"),
    ],
)
def test_features_that_the_data_lack_are_refused(changes, message):
    options, vocab = variant("onerec_v2", **changes)
    with pytest.raises(ValueError, match=message):
        build(options, vocab)


def test_the_order_of_names_is_the_order_of_the_widths():
    """Wide features beside narrow ones, the SID's tables among them."""
    check_variant(
        "onerec_v2",
        features=("gap", "sid", "item"),
        feature_widths={"gap": 1, "sid": 4, "item": 2},
        rows=2,
    )


def test_hashing_a_bounded_feature_makes_its_table_smaller():
    options = ModelOptions(features=("item",), hashed={"item": 3})
    model = build(options, Vocabulary((4, 4), {"item": 1000}, {"history": 2}))
    assert model.context.features.others.tables["item"].weight.shape[0] == 3


@pytest.mark.parametrize("option", ["scenario_bos", "scenario_head_bias"])
def test_scenario_conditioning_needs_scenarios(option):
    vocab = Vocabulary(codes=(5, 4), features={"item": 11}, pathways={"history": 7})
    with pytest.raises(ValueError, match="wants the feature 'scenario'"):
        build(ModelOptions(d_model=8, n_layers=1, n_heads=2, **{option: True}), vocab)


def test_names_that_a_module_dict_keeps_for_itself():
    names = ("type", "items", "float", "plain")
    vocab = Vocabulary(codes=(5, 4), features=dict.fromkeys(names, 6), pathways={"train": 3, "keys": 4})
    model = build(ModelOptions(d_model=8, n_layers=1, n_heads=2, features=("sid", *names)), vocab)
    context = Context(
        {
            name: Events(torch.zeros(2, n, 2).long(), torch.arange(n).repeat(2, 1), torch.tensor([n, 1]), ids)
            for name, n in vocab.pathways.items()
            for ids in [{feature: torch.randint(6, (2, n)) for feature in names}]
        }
    )
    assert model.context(context).x_BPD.shape == (2, 1 + 3 + 4, 8)
