"""The stack of summary attention and the lifelong pathway: against a dense mask, and by what may influence what."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ksa_cases import EPS, LENGTHS, dense_stack, small_options, stack
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.ksa.attention import KSAAttention
from onetrain.model.ksa.layout import Layout
from onetrain.model.ksa.part import Part, Sequence
from onetrain.model.ksa.rotary import rotate
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.lifelong import LifelongPathway, read_counts, reading
from onetrain.model.options import KSAOptions, ModelOptions
from onetrain.model.pathway import ALWAYS, NEVER

CPU = torch.device("cpu")


def all_rows(module: KSAStack, x_TD: Tensor, lengths: list[int]) -> Tensor:
    """States of [all text; all summaries]."""
    layout = module.layout(lengths, CPU)
    return module(x_TD, module.sequence.part(layout), torch.arange(layout.n_text + layout.n_summaries))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), lengths=LENGTHS)
def test_stack_equals_dense(seed: int, lengths: list[int]) -> None:
    """Random patterns, chunks, windows, blends and packings: states, and gradients of inputs and every weight."""
    module = stack(small_options(seed), seed)
    x_TD = torch.randn(sum(lengths), 16, dtype=torch.float64, requires_grad=True)
    got = all_rows(module, x_TD, lengths)
    want = dense_stack(module, x_TD, module.layout(lengths, CPU))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    leaves, weight = [x_TD, *module.parameters()], torch.randn_like(got)
    gradients = [torch.autograd.grad(y, leaves, weight, allow_unused=True) for y in (got, want)]
    for got_grad, want_grad in zip(*gradients, strict=True):
        assert (got_grad is None) == (want_grad is None)
        if got_grad is not None:
            torch.testing.assert_close(got_grad, want_grad, rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), lengths=LENGTHS)
def test_packed_histories_equal_separate_ones(seed: int, lengths: list[int]) -> None:
    module = stack(small_options(seed), seed)
    x_TD = torch.randn(sum(lengths), 16, dtype=torch.float64)
    packed = all_rows(module, x_TD, lengths)
    alone = [all_rows(module, x_UD, [len(x_UD)]) for x_UD in x_TD.split(lengths)]
    text = [states[:length] for states, length in zip(alone, lengths, strict=True)]
    summaries = [states[length:] for states, length in zip(alone, lengths, strict=True)]
    torch.testing.assert_close(packed, torch.cat((*text, *summaries)), rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(2, 60), data=st.data())
def test_nothing_sees_the_future(seed: int, length: int, data: st.DataObject) -> None:
    """Events after t change no text before, and no summary of a chunk that was complete."""
    options = small_options(seed)
    module = stack(options, seed)
    t = data.draw(st.integers(1, length - 1))
    x_TD = torch.randn(length, 16, dtype=torch.float64)
    changed_TD = torch.cat((x_TD[:t], torch.randn(length - t, 16, dtype=torch.float64)))
    before, after = all_rows(module, x_TD, [length]), all_rows(module, changed_TD, [length])
    complete = t // options.chunk * options.summaries
    assert torch.equal(before[:t], after[:t])
    assert torch.equal(before[length : length + complete], after[length : length + complete])
    assert not torch.equal(before[t], after[t])


def test_old_chunks_speak_through_their_summary_alone() -> None:
    """Two layers: the first writes a chunk into its summary, the second reads it. With the second's summary keys and
    values at zero, a chunk that no window reaches changes nothing.
    """
    module = stack(KSAOptions(width=16, heads=2, layers=("ksa", "ksa"), chunk=4, summaries=1, window=2))
    x_TD = torch.randn(40, 16, dtype=torch.float64)
    changed_TD = x_TD.clone()
    changed_TD[4:8] += 1.0  # chunk 1: through two windows of text it reaches chunk 5
    states = [all_rows(module, x, [40])[24:40] for x in (x_TD, changed_TD)]
    assert (states[0] - states[1]).abs().amax(1).min() > 1e-6
    attention = module.blocks[1].attention
    assert isinstance(attention, KSAAttention)
    assert attention.summary is not None
    nn.init.zeros_(attention.summary.value.weight)
    nn.init.zeros_(attention.summary.key.weight)
    states = [all_rows(module, x, [40])[24:40] for x in (x_TD, changed_TD)]
    assert torch.equal(*states)


def test_a_full_layer_is_causal_attention_over_text() -> None:
    module = stack(KSAOptions(width=16, heads=4, kv_groups=2, layers=("full",), chunk=4, summaries=2, window=1))
    attention = module.blocks[0].attention
    assert isinstance(attention, KSAAttention)
    h_TD = torch.randn(30, 16, dtype=torch.float64)
    part = module.sequence.part(Layout.of([30], 4, 0))
    q, k, v = attention.project_text(h_TD, part.position_T)
    y_HTK = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    got_TD = attention(h_TD, part, Sequence())
    torch.testing.assert_close(got_TD, attention.out(y_HTK.transpose(0, 1).flatten(1)), rtol=1e-12, atol=1e-12)


def test_without_summaries_it_is_sliding_chunk_attention() -> None:
    """The ablation of the paper: text in the window, and nothing else."""
    module = stack(KSAOptions(width=16, heads=2, layers=("ksa",), chunk=4, summaries=0, window=1))
    x_TD = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    all_rows(module, x_TD, [40])[29].sum().backward()  # chunk 7 sees chunks 6 and 7
    assert x_TD.grad is not None
    assert x_TD.grad.abs().sum(1).nonzero().flatten().tolist() == list(range(24, 30))


def test_blend_0_equals_shared_projections_to_the_bit() -> None:
    options = KSAOptions(width=16, heads=2, layers=("ksa", "ksa"), chunk=3, summaries=2, window=1)
    module, shared = stack(options), stack(replace(options, blend=0.0))
    shared.load_state_dict({name: module.state_dict()[name] for name in shared.state_dict()})
    for block in module.blocks:
        block.attention.blend.fill_(0.0)
    x_TD = torch.randn(25, 16, dtype=torch.float64)
    assert torch.equal(all_rows(module, x_TD, [25]), all_rows(shared, x_TD, [25]))


def test_blend_1_does_not_touch_the_texts_projections() -> None:
    """Summaries of the first layer with other text queries: to the bit the same."""
    module = stack(KSAOptions(width=16, heads=2, layers=("ksa",), chunk=3, summaries=1, window=1))
    x_TD = torch.randn(24, 16, dtype=torch.float64)
    before = all_rows(module, x_TD, [24])
    nn.init.normal_(module.blocks[0].attention.text.query.weight)
    after = all_rows(module, x_TD, [24])
    assert torch.equal(before[24:], after[24:])
    assert not torch.equal(before[:24], after[:24])


def test_blend_between_its_ends() -> None:
    """lam * Norm(W^s x) + (1 - lam) * Norm(W x) for queries and keys, without norm for values, then positions."""
    attention = KSAAttention(KSAOptions(width=16, heads=2, kv_groups=1, blend=0.3), False, EPS).double()
    assert attention.summary is not None
    assert attention.q_norm is not None
    h_RD, position_R = torch.randn(5, 16, dtype=torch.float64), torch.tensor([3, 7, 11, 15, 19])
    got = attention.project_summaries(h_RD, position_R)

    def heads(layer: nn.Module) -> Tensor:
        return layer(h_RD).unflatten(-1, (-1, 8)).transpose(0, 1)

    q = 0.3 * attention.q_norm(heads(attention.summary.query)) + 0.7 * attention.q_norm(heads(attention.text.query))
    v = 0.3 * heads(attention.summary.value) + 0.7 * heads(attention.text.value)
    torch.testing.assert_close(got.q_HNK, rotate(q, position_R, 10_000.0), rtol=1e-6, atol=1e-6)  # 0.3 is kept in fp32
    torch.testing.assert_close(got.v_GNK, v, rtol=1e-6, atol=1e-6)


def test_rotary_scores_depend_on_distance_alone() -> None:
    """And turn pairs (i, i + K/2), as complex numbers would."""
    x, y = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    scores = [
        (rotate(x, torch.tensor([7 + shift]), 100.0) * rotate(y, torch.tensor([3 + shift]), 100.0)).sum()
        for shift in (0, 10, 5000)
    ]
    torch.testing.assert_close(scores[1:], [scores[0]] * 2, rtol=1e-9, atol=1e-9)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(
        torch.ones(4, dtype=torch.float64), 5 * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    )
    torch.testing.assert_close(rotate(x, torch.tensor([5]), 100.0), torch.cat((turned.real, turned.imag), -1))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, chunk=st.integers(1, 6), summaries=st.integers(0, 3), window=st.integers(0, 5))
def test_the_decoder_reads_every_event_once(lengths: list[int], chunk: int, summaries: int, window: int) -> None:
    """As text from the last window on, or through the summaries of its chunk: what the next event would see, had it
    come in the newest chunk.
    """
    options = KSAOptions(chunk=chunk, summaries=summaries, window=window)
    layout = Layout.of(lengths, chunk, summaries)
    rows_BP, real_BP = reading(layout, options)
    for number, length in enumerate(lengths):
        got = rows_BP[number][real_BP[number]].tolist()
        events, old = read_counts(length, options)
        first = int(layout.text_start_U[number]) + length - events
        summary = layout.n_text + int(layout.summary_start_U[number])
        assert got == [*range(summary, summary + old), *range(first, first + events)]
        assert (length - events) * summaries == old * chunk
        if length:
            assert (length - events) // chunk == max((length - 1) // chunk - window, 0)


def test_lifelong_pathway_packs_rows_and_forgets_hidden_events() -> None:
    """A row equals itself alone; hidden events count as ones that never were; padding is never seen."""
    options = ModelOptions(
        d_model=16, n_heads=2, ksa={"long": KSAOptions(width=16, heads=2, layers=("ksa", "full"), chunk=3, window=1)}
    )
    torch.manual_seed(0)
    pathway = LifelongPathway(options, "long", 10).double()
    x_BNC, length_B = torch.randn(3, 20, 10, dtype=torch.float64), torch.tensor([20, 0, 11])
    index_BN = torch.arange(20).expand(3, -1).clone()
    index_BN[torch.arange(20) >= length_B[:, None]] = NEVER
    index_BN[0, [2, 5]] = NEVER
    got = pathway(x_BNC, length_B, index_BN)
    seen_B = (got.index_BP == ALWAYS).sum(1)
    assert torch.equal((got.index_BP == NEVER).sum(1), got.index_BP.shape[1] - seen_B)
    for row, events in enumerate(
        (x_BNC[0, torch.tensor([n for n in range(20) if n not in (2, 5)])], None, x_BNC[2, :11])
    ):
        if events is None:
            assert seen_B[row] == 0
            continue
        alone = pathway(events[None], torch.tensor([len(events)]), torch.arange(len(events))[None])
        assert seen_B[row] == alone.x_BPD.shape[1] == sum(read_counts(len(events), options.ksa["long"]))
        torch.testing.assert_close(got.x_BPD[row, : seen_B[row]], alone.x_BPD[0], rtol=1e-10, atol=1e-10)


def test_parts_of_a_layout() -> None:
    """The rows that a process computes keep their positions, chunks and ranges."""
    layout = Layout.of([10, 7], 3, 2)
    part = Part(layout, 6, 13, 4, 8)  # two chunks of the first history, its rest, and one chunk of the second
    assert part.position_T.tolist() == [6, 7, 8, 9, 0, 1, 2]
    assert part.chunk_text_ZC.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert part.position_R.tolist() == [6, 8, 0, 2]  # floor((j + 1) * 3 / 2) - 1 = 0, 2 within a chunk
    assert part.ranges(1).text_begin_T.tolist() == [3, 3, 3, 6, 10, 10, 10]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 12, "heads": 4}, "multiple of 2 \\* heads"),
        ({"heads": 4, "kv_groups": 3}, "multiple of kv_groups"),
        ({"chunk": 0}, "chunk is 0"),
        ({"layers": ()}, "layers is empty"),
        ({"blend": 1.5}, "blend is 1.5"),
        ({"window": -1}, "window is -1"),
        ({"rope_base": 1.0}, "rope_base is 1.0"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KSAOptions(**wrong)


@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_every_parameter_has_a_gradient_at_either_end_of_the_blend(blend: float) -> None:
    """Of zero where it has no effect: ZeRO 3 keeps the last gradient of a parameter that gets none."""
    module = stack(KSAOptions(width=16, heads=2, layers=("ksa", "full"), chunk=3, summaries=1, window=1))
    for block in module.blocks:
        block.attention.blend.fill_(blend)
    all_rows(module, torch.randn(25, 16, dtype=torch.float64), [25]).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (blend > 0 or ".attention.summary." not in name), name
