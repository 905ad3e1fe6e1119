"""The kernels of summary attention against a dense mask: outputs, log-sum-exp and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ksa_cases import LENGTHS, WINDOWS
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.ksa import flex
from onetrain.model.ksa.blocked import blocked_attention
from onetrain.model.ksa.kernels import attention, kernel_for
from onetrain.model.ksa.layout import Layout, Window, score_pairs
from onetrain.model.ksa.reference import dense_attention, visible

SIZES = {"chunk": st.integers(1, 8), "summaries": st.integers(0, 3), "window": WINDOWS}


class Case:
    """Random queries, keys and values of a layout, and the dense answer."""

    def __init__(self, layout: Layout, window: Window, heads: int, groups: int, dtype: torch.dtype = torch.float64):
        torch.manual_seed(layout.n_text + heads)
        self.text, rows, width = layout.n_text, layout.n_text + layout.n_summaries, 5
        self.q_HTK = (2 * torch.randn(heads, self.text, width, dtype=dtype)).requires_grad_()
        self.k_GAK, self.v_GAK = (torch.randn(groups, rows, width, dtype=dtype).requires_grad_() for _ in range(2))
        self.grad_HTK = torch.randn(heads, self.text, width, dtype=dtype)
        self.ranges = layout.ranges(window)
        self.seen_TA = visible(layout, window)[: self.text]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.q_HTK, self.k_GAK, self.v_GAK

    @property
    def parts(self) -> tuple[KeyValue, KeyValue]:
        """Keys and values of text and of summaries."""
        cut = self.text
        return KeyValue(self.k_GAK[:, :cut], self.v_GAK[:, :cut]), KeyValue(self.k_GAK[:, cut:], self.v_GAK[:, cut:])

    def dense(self) -> tuple[Tensor, Tensor]:
        return dense_attention(*self.inputs, self.seen_TA)

    def gradients(self, out_HTK: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out_HTK, self.inputs, self.grad_HTK.to(out_HTK.dtype))


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    tile=st.integers(1, 30),
    block=st.integers(1, 40),
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    **SIZES,
)
def test_blocked_equals_dense(
    lengths: list[int], chunk: int, summaries: int, window: Window, tile: int, block: int, groups: tuple[int, int]
) -> None:
    """Float64: 1e-10 is rounding. Tiles and blocks of any size, also such that chunks are cut through."""
    case = Case(Layout.of(lengths, chunk, summaries), window, *groups)
    want_HTK, want_HT = case.dense()
    got_HTK, got_HT = blocked_attention(case.q_HTK, *case.parts, case.ranges, tile, block)
    torch.testing.assert_close(got_HTK, want_HTK, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_HT, want_HT, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(case.gradients(got_HTK), case.gradients(want_HTK), rtol=1e-10, atol=1e-10)


def test_blocked_passes_gradcheck() -> None:
    case = Case(Layout.of([9, 4], 2, 1), 1, 2, 1)

    def run(q_HTK: Tensor, k_GAK: Tensor, v_GAK: Tensor) -> Tensor:
        cut = case.text
        text, summary = KeyValue(k_GAK[:, :cut], v_GAK[:, :cut]), KeyValue(k_GAK[:, cut:], v_GAK[:, cut:])
        return blocked_attention(q_HTK, text, summary, case.ranges, 4, 3)[0]

    assert torch.autograd.gradcheck(run, case.inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_blocked_in_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """Against float64 on the same rounded inputs; bf16 rounds its output (2^-8) and nothing within."""
    layout = Layout.of([700, 300], 8, 1)
    case = Case(layout, 8, 4, 2, dtype)
    got_HTK, _ = blocked_attention(case.q_HTK, *case.parts, case.ranges)
    assert got_HTK.dtype == dtype
    grads = case.gradients(got_HTK)
    exact = [x.detach().double().requires_grad_() for x in case.inputs]
    want_HTK, _ = dense_attention(*exact, case.seen_TA)
    want = torch.autograd.grad(want_HTK, exact, case.grad_HTK.double())
    for got, reference in zip((got_HTK, *grads), (want_HTK, *want), strict=True):
        assert (got.double() - reference).norm() <= tolerance * reference.norm()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """The softmax is merged across blocks in logs: scores of +-500 in fp32."""
    layout = Layout.of([64], 4, 1)
    case = Case(layout, 2, 2, 2, torch.float32)
    q_HTK = (case.q_HTK * 100).detach()
    got_HTK, got_HT = blocked_attention(q_HTK, *case.parts, case.ranges, 16, 8)
    want_HTK, want_HT = dense_attention(q_HTK, case.k_GAK, case.v_GAK, case.seen_TA)
    assert got_HT.abs().max() > 200
    torch.testing.assert_close(got_HT, want_HT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got_HTK, want_HTK, rtol=1e-4, atol=1e-4)


def test_what_is_kept_for_the_backward_pass_is_linear() -> None:
    """Queries, keys, values, output, log-sum-exp: nothing that has a row per query and a column per key."""

    def kept(length: int) -> int:
        case = Case(Layout.of([length], 8, 1), 16, 2, 2, torch.float32)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out_HTK, _ = blocked_attention(case.q_HTK, *case.parts, case.ranges)
        assert out_HTK.requires_grad
        return sum(sizes.values())

    assert kept(4096) <= 2.01 * kept(2048)
    rows = 2048 * 2  # of both heads
    assert kept(2048) <= 4 * (5 * rows * 4.25 + rows)  # q, k, v, out of width 5 (k and v with summaries), and lse


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3), **SIZES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_blocked(lengths: list[int], chunk: int, summaries: int, window: Window) -> None:
    """Forward, uncompiled, on the CPU: torch has no backward of it there. On a GPU see the test below."""
    torch.manual_seed(sum(lengths))
    layout = Layout.of(lengths, chunk, summaries)
    q_HTK = torch.randn(4, layout.n_text, 16)
    text, summary = (
        KeyValue(torch.randn(2, rows, 16), torch.randn(2, rows, 16)) for rows in (layout.n_text, layout.n_summaries)
    )
    ranges = layout.ranges(window)
    want = blocked_attention(q_HTK, text, summary, ranges)
    torch.testing.assert_close(attention(q_HTK, text, summary, ranges, "flex"), want[0], rtol=1e-5, atol=1e-5)
    if layout.n_text == 0:
        return
    got = flex.flex_attention(q_HTK, text, summary, ranges)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, size=st.sampled_from([1, 4, 7, 16, 128]), **SIZES)
def test_blocks_of_flex_hold_every_pair_once(
    lengths: list[int], chunk: int, summaries: int, window: Window, size: int
) -> None:
    layout = Layout.of(lengths, chunk, summaries)
    text, old = layout.n_text, layout.n_summaries
    mask = flex.block_mask(layout.ranges(window), old, text, size)
    own = old * chunk + old * (summaries + 1) // 2
    assert flex.seen_pairs(mask, text, text + old) + own == sum(
        score_pairs(length, chunk, summaries, window) for length in lengths
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
def test_flex_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and gradients against the blocked kernel in fp32 (whose products may be TF32 in the compiled one)."""
    layout = Layout.of([900, 5, 2000], 8, 1, "cuda")
    q = torch.randn(8, layout.n_text, 64, device="cuda", dtype=dtype, requires_grad=True)
    kv = [
        torch.randn(2, rows, 64, device="cuda", dtype=dtype, requires_grad=True)
        for rows in (layout.n_text, layout.n_text, layout.n_summaries, layout.n_summaries)
    ]
    results = []
    for kernel in ("flex", "blocked"):
        out = attention(q, KeyValue(*kv[:2]), KeyValue(*kv[2:]), layout.ranges(16), kernel)
        results.append((out, *torch.autograd.grad(out, (q, *kv), torch.ones_like(out))))
    for got, want in zip(*results, strict=True):
        assert (got - want).float().norm() <= tolerance * want.float().norm()


def test_which_kernel_runs() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [kernel_for("auto", device) for device in (cpu, gpu)] == ["blocked", "flex"]
    assert kernel_for("blocked", gpu) == "blocked"
