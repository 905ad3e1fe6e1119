"""Who sees whom: the dense mask, the ranges that fast kernels use, and the number of score pairs (KSA, section 2.4)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ksa_cases import LENGTHS, WINDOWS
from torch import Tensor

from onetrain.model.ksa.blocked import computed_pairs, seen_pairs, tiles
from onetrain.model.ksa.layout import Layout, Window, score_pairs
from onetrain.model.ksa.reference import visible

SIZES = {"chunk": st.integers(1, 8), "summaries": st.integers(0, 3), "window": WINDOWS}


def sets(length: int, chunk: int, summaries: int, window: Window) -> list[set[tuple[str, int]]]:
    """What every row of one history sees, as Python sets, written from the sentences of section 1."""
    chunks = [range(i * chunk, (i + 1) * chunk) for i in range(length // chunk)]
    rows = []
    for t in range(length):
        own = t // chunk
        seen = {("text", b) for b in range(own * chunk, t + 1)}
        for i in range(own):
            if window == "full" or i >= own - window:
                seen |= {("text", b) for b in chunks[i]}
            else:
                seen |= {("summary", i * summaries + j) for j in range(summaries)}
        rows.append(seen)
    for i, texts in enumerate(chunks):
        for j in range(summaries):
            rows.append({("text", b) for b in texts} | {("summary", i * summaries + k) for k in range(j + 1)})
    return rows


def test_the_figure_of_the_paper() -> None:
    """C = 4, S = 1, W = 1, three chunks; rows and columns t0..t11, s0..s2."""
    drawn = """
        1...........|...
        11..........|...
        111.........|...
        1111........|...
        11111.......|...
        111111......|...
        1111111.....|...
        11111111....|...
        ....11111...|1..
        ....111111..|1..
        ....1111111.|1..
        ....11111111|1..
        1111........|1..
        ....1111....|.1.
        ........1111|..1
    """
    want = [[mark == "1" for mark in line.strip().replace("|", "")] for line in drawn.split()]
    assert visible(Layout.of([12], 4, 1), 1).tolist() == want


def test_positions_of_summary_tokens() -> None:
    assert Layout.of([10, 4], 4, 1).position_R.tolist() == [3, 7, 3]
    assert Layout.of([8], 4, 3).position_R.tolist() == [0, 1, 3, 4, 5, 7]  # floor((j + 1) * 4 / 3) - 1
    assert Layout.of([2], 1, 3).position_R.tolist() == [0, 0, 0, 1, 1, 1]  # never before their chunk


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, **SIZES)
def test_mask_equals_the_sets(lengths: list[int], chunk: int, summaries: int, window: Window) -> None:
    """Also of packed histories: each has the sets of its own, and sees no other."""
    layout = Layout.of(lengths, chunk, summaries)
    seen_AA = visible(layout, window)
    want_AA = torch.zeros_like(seen_AA)
    for number, length in enumerate(lengths):
        text, summary = int(layout.text_start_U[number]), layout.n_text + int(layout.summary_start_U[number])
        for row, columns in enumerate(sets(length, chunk, summaries, window)):
            at = text + row if row < length else summary + row - length
            for kind, column in columns:
                want_AA[at, (text if kind == "text" else summary) + column] = True
    assert torch.equal(seen_AA, want_AA)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, **SIZES)
def test_ranges_equal_the_mask(lengths: list[int], chunk: int, summaries: int, window: Window) -> None:
    layout = Layout.of(lengths, chunk, summaries)
    ranges, seen_AA = layout.ranges(window), visible(layout, window)
    text = layout.n_text
    assert torch.equal(inside(ranges.text_begin_T, ranges.text_end_T, text), seen_AA[:text, :text])
    summary_TR = inside(ranges.summary_begin_T, ranges.summary_end_T, layout.n_summaries)
    assert torch.equal(summary_TR, seen_AA[:text, text:])
    for bound_T in ranges.bounds:
        assert torch.equal(bound_T, bound_T.sort().values)  # the kernels bound a tile by its first and last row


def inside(begin_T: Tensor, end_T: Tensor, count: int) -> Tensor:
    """(T, count) bool."""
    number = torch.arange(count)
    return (number >= begin_T[:, None]) & (number < end_T[:, None])


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 80), chunk=st.integers(1, 8), summaries=st.integers(1, 3), window=st.integers(0, 6))
def test_every_earlier_chunk_is_seen_in_one_form(length: int, chunk: int, summaries: int, window: int) -> None:
    layout = Layout.of([length], chunk, summaries)
    seen_AA = visible(layout, window)
    text_TZ = seen_AA[:length, : length // chunk * chunk].unflatten(1, (-1, chunk)).float().mean(-1)
    summary_TZ = seen_AA[:length, length:].unflatten(1, (-1, summaries)).float().mean(-1)
    earlier_TZ = torch.arange(length // chunk) < (torch.arange(length) // chunk)[:, None]
    assert torch.equal((text_TZ + summary_TZ)[earlier_TZ], torch.ones(int(earlier_TZ.sum())))
    assert set(text_TZ[earlier_TZ].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("window", [13, 100, "full"])
def test_a_window_that_never_closes_is_causal(window: Window) -> None:
    seen_AA = visible(Layout.of([50], 4, 2), window)
    assert torch.equal(seen_AA[:50, :50], torch.ones(50, 50).tril().bool())
    assert not seen_AA[:50, 50:].any()


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, tile=st.integers(1, 40), block=st.integers(1, 50), **SIZES)
def test_pairs_of_the_kernel_equal_the_formula(
    lengths: list[int], chunk: int, summaries: int, window: Window, tile: int, block: int
) -> None:
    """Text rows' pairs from the kernel's own list of blocks; summary rows' own chunks are apart."""
    layout = Layout.of(lengths, chunk, summaries)
    ranges = layout.ranges(window)
    work = tiles(ranges, tile, block)
    own = layout.n_summaries * chunk + layout.n_summaries * (summaries + 1) // 2
    formula = sum(score_pairs(length, chunk, summaries, window) for length in lengths)
    assert seen_pairs(work) + own == formula == int(visible(layout, window).sum())
    assert computed_pairs(work) >= seen_pairs(work)


@pytest.mark.parametrize(
    ("length", "pairs", "ratio"),
    [(8192, 1.11e7, 3.0), (32768, 9.62e7, 5.6), (65536, 3.27e8, 6.6), (131072, 1.19e9, 7.2)],
)
def test_pairs_of_the_published_table(length: int, pairs: float, ratio: float) -> None:
    """Specification, section 4, and the kernel's list at that size: what it computes in vain stays below a fifth."""
    counted = score_pairs(length, 8, 1, 128)
    assert counted == pytest.approx(pairs, rel=0.005)
    assert length * (length + 1) / 2 / counted == pytest.approx(ratio, abs=0.05)
    layout = Layout.of([length], 8, 1)
    assert computed_pairs(tiles(layout.ranges(128))) < 1.2 * counted


def test_the_reference_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="at most 20000"):
        visible(Layout.of([30_000], 8, 1), 128)
