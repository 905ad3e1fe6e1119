"""What a history costs, in closed form, against dense masks and against the cache of a decode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ksa_cases import small_options, stack

from onetrain.model.ksa.cache import LayerCache
from onetrain.model.ksa.layout import Layout
from onetrain.model.ksa.reference import visible
from onetrain.model.ksa.sizes import StackWork, cache_rows, stack_pairs, stack_parameters, stack_work, total
from onetrain.model.lifelong import reading
from onetrain.model.options import KSAOptions
from onetrain.model.presets import STACKS

cases = given(seed=st.integers(0, 10_000), length=st.integers(0, 60))


@settings(max_examples=60, deadline=None, derandomize=True)
@cases
def test_work_is_that_of_dense_masks(seed, length):
    options = small_options(seed)
    layout = Layout.of([length], options.chunk, options.summaries)
    in_full = Layout.of([length], options.chunk, 0) if options.bypass_full else layout
    work = stack_work(length, options)
    assert (work.text, work.summaries) == (layout.n_text, layout.n_summaries)
    assert work.pairs == int(visible(layout, options.window).sum())
    assert work.full_pairs == int(visible(in_full, "full").sum())
    assert work.read == int(reading(layout, options).real_BP.sum())
    pairs, full_pairs = stack_pairs(length, options)
    assert pairs == sum({"ksa": work.pairs, "full": work.full_pairs}[kind] for kind in options.layers)
    assert full_pairs == len(options.layers) * int(visible(Layout.of([length], 1, 0), "full").sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@cases
def test_cache_rows_are_those_of_a_decode(seed, length):
    options = small_options(seed)
    layers = [LayerCache(options, kind == "full", 1, torch.zeros(1)) for kind in options.layers]
    rows = sum(int(layer.rows(torch.tensor([length]))) for layer in layers)
    assert cache_rows(length, options) == (rows, len(options.layers) * length)


@pytest.mark.parametrize(("length", "rows"), [(8192, 2057), (32768, 5129), (131072, 17417)])
def test_cache_rows_of_the_papers_sizes(length, rows):
    """The table of the specification, section 5.3, which counts one scratch row more."""
    assert cache_rows(length, KSAOptions(layers=("ksa",)))[0] == rows - 1
    assert cache_rows(length, KSAOptions())[0] == 3 * (rows - 1) + length


@pytest.mark.parametrize("seed", range(20))
def test_parameters_are_those_of_a_stack(seed):
    options = small_options(seed)
    built = sum(parameter.numel() for parameter in stack(options).parameters())
    assert stack_parameters(options) + options.summaries * options.width == built


def test_work_adds_up():
    one, two = stack_work(10, KSAOptions()), stack_work(33, KSAOptions())
    assert total([one, two, one]).dot(StackWork(1, 10, 0, 0, 100)) == 53 + 10 * (1 + 4 + 1) + 100 * 53
    assert total([one] * 3) == one.times(3)


# positions that the decoder reads, share of full attention's score pairs, share of its cache rows
PRESETS = {
    "2k": (2_000, 481, 0.505, 0.443),
    "10k": (10_000, 2_153, 0.472, 0.421),
    "100k": (100_000, 4_148, 0.051, 0.042),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_a_preset_costs(name):
    length, read, pairs, rows = PRESETS[name]
    options = STACKS[name]
    assert options.preset == name
    assert stack_work(length, options).read == read
    for (mine, full), share in ((stack_pairs(length, options), pairs), (cache_rows(length, options), rows)):
        assert mine / full == pytest.approx(share, abs=5e-4)
