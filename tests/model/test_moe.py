"""The sparse block against the equations of DeepSeek-V3 in loops over tokens and experts, in float64.

Legend: R rows, S tokens per row, D width, E experts, K experts per token.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_layers import experts, router_losses, routing, sequence_loss, softmax, z_loss
from torch import nn
from torch.nn import functional as F

from onetrain.model.moe import SparseFFN, balanced_bias, route, run_experts
from onetrain.model.options import ModelOptions, MoEOptions

CASES = {
    "plain": MoEOptions(4, 2),
    "odd numbers": MoEOptions(5, 3, shared=2),
    "one of three": MoEOptions(3, 1, shared=1, renormalise=False),
    "all": MoEOptions(2, 2),
    "softmax": MoEOptions(5, 2, score="softmax"),
    "softmax not renormalised": MoEOptions(5, 2, shared=1, score="softmax", renormalise=False),
    "scaled": MoEOptions(6, 2, scale=2.5),
    "groups": MoEOptions(8, 3, groups=4, top_groups=2),
    "groups of one": MoEOptions(4, 2, groups=4, top_groups=3),
    "DeepSeek-V3": MoEOptions(12, 4, shared=1, scale=2.5, groups=4, top_groups=2, sequence_loss=0.3, z_loss=0.1),
}


def random_block(options, d=8, d_expert=3, dtype=torch.float64, bias=0.1):
    """A block with outputs of about 1, and a bias that changes choices."""
    torch.manual_seed(0)
    options = dataclasses.replace(options, d_expert=d_expert)
    block = SparseFFN(ModelOptions(d_model=d, n_heads=2, moe=options))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    block.router.e_score_correction_bias.normal_(std=bias)
    return block.to(dtype)


def copy_of(block, dtype):
    """The same numbers in a wider type."""
    other = SparseFFN(ModelOptions(d_model=block.router.weight.shape[1], n_heads=1, moe=block.router.options))
    other.to(dtype).load_state_dict(block.state_dict())
    return other


def tensors_of(block):
    """Parameters and the bias, as the reference names them."""
    return {f"ffn.{name}": tensor for name, tensor in (*block.named_parameters(), *block.named_buffers())}


def in_loops(block, x_RSD):
    """Outputs, and the auxiliary losses of every row."""
    p, options = tensors_of(block), block.router.options
    y_RSD = torch.stack([torch.stack([experts(p, "ffn", x, options) for x in x_SD]) for x_SD in x_RSD])
    return y_RSD, torch.stack([router_losses(p, "ffn", list(x_SD), options) for x_SD in x_RSD])


def gradients(block, x_RSD, outputs, loss_R):
    """Of a random sum of outputs and auxiliary losses: by the input and by every parameter."""
    g = torch.Generator().manual_seed(3)
    score = (outputs.double() * torch.randn(outputs.shape, generator=g, dtype=torch.float64)).sum()
    if loss_R is not None:
        score = score + (loss_R.double() * torch.rand(loss_R.shape, generator=g, dtype=torch.float64)).sum()
    wanted = {"input": x_RSD, **dict(block.named_parameters())}
    found = torch.autograd.grad(score, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(wanted.items(), found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_outputs_losses_and_gradients_equal_the_loops(name):
    block = random_block(CASES[name])
    x_RSD = torch.randn(5, 3, 8, dtype=torch.float64).requires_grad_()
    y_RSD, (expected_RSD, loss_R) = block(x_RSD), in_loops(block, x_RSD)
    torch.testing.assert_close(y_RSD, expected_RSD, rtol=1e-10, atol=1e-11)
    record = block.router.record
    if record.loss_R is not None:
        torch.testing.assert_close(record.loss_R, loss_R, rtol=1e-10, atol=1e-11)
    expected = gradients(block, x_RSD, expected_RSD, loss_R if loss_R.requires_grad else None)
    for parameter, gradient in gradients(block, x_RSD, y_RSD, record.loss_R).items():
        torch.testing.assert_close(
            gradient, expected[parameter], rtol=1e-8, atol=1e-10, msg=lambda m, n=parameter: n + m
        )
        assert gradient.any()


def test_biased_choices_are_not_the_plain_ones():
    """Else the cases above would not see a missing bias, or one that is in the weights."""
    block = random_block(CASES["DeepSeek-V3"])
    x_RSD = torch.randn(40, 3, 8, dtype=torch.float64)
    p, options = tensors_of(block), block.router.options
    plain = {name: tensor for name, tensor in p.items() if "bias" not in name}
    pairs = [(routing(p, "ffn", x, options), routing(plain, "ffn", x, options)) for x in x_RSD.flatten(0, 1)]
    changed = sum(set(ours[1]) != set(theirs[1]) for ours, theirs in pairs)
    assert 0.1 * len(pairs) < changed < 0.95 * len(pairs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-6),  # rounding of 2^-24, over sums of 32 products
        (torch.bfloat16, 2e-2),  # rounding of 2^-9 of input products, hidden layer and output
    ],
)
@pytest.mark.parametrize("name", ["plain", "DeepSeek-V3"])
def test_grouped_products_equal_the_loops(name, dtype, tolerance, monkeypatch):
    """Widths that torch's grouped_mm takes; errors relative to the norm of each tensor."""
    block = random_block(CASES[name], d=32, d_expert=24, dtype=dtype)
    x_RSD = torch.randn(7, 3, 32).to(dtype).requires_grad_()
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs))
    y_RSD = block(x_RSD)
    assert len(calls) == 3
    assert y_RSD.dtype == dtype
    exact, exact_x = copy_of(block, torch.float64), x_RSD.detach().double().requires_grad_()
    assert exact.router.e_score_correction_bias.equal(block.router.e_score_correction_bias)
    expected_RSD, loss_R = in_loops(exact, exact_x)
    pairs = {"output": (y_RSD, expected_RSD)}
    found = gradients(block, x_RSD, y_RSD, block.router.record.loss_R)
    expected = gradients(exact, exact_x, expected_RSD, loss_R if loss_R.requires_grad else None)
    pairs |= {parameter: (found[parameter], expected[parameter]) for parameter in found}
    for what, (ours, theirs) in pairs.items():
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert float(error.detach()) < tolerance, what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(dtype):
    block = random_block(CASES["DeepSeek-V3"], d_expert=8, dtype=dtype)
    x_RSD = torch.zeros(0, 3, 8, dtype=dtype, requires_grad=True)
    y_RSD = block(x_RSD)
    assert y_RSD.shape == (0, 3, 8)
    record = block.router.record
    assert record.load_SE.shape == (3, 12)
    assert not record.load_SE.any()
    assert (float(record.entropy), record.loss_R.shape) == (0.0, (0,))
    for gradient in gradients(block, x_RSD, y_RSD, record.loss_R).values():
        assert not gradient.any()


@pytest.mark.parametrize(("d_expert", "dtype"), [(3, torch.float64), (8, torch.float32), (8, torch.bfloat16)])
def test_experts_without_tokens(d_expert, dtype):
    """Every token goes to experts 1 and 4: the others have a gradient of exactly zero, also in reused memory."""
    block = random_block(MoEOptions(6, 2), d_expert=d_expert, dtype=dtype)
    block.router.e_score_correction_bias.copy_(torch.tensor([0.0, 9, 0, 0, 9, 0]))
    x_RSD = torch.randn(5, 3, 8).to(dtype).requires_grad_()
    y_RSD = block(x_RSD)
    assert block.router.record.load_SE.tolist() == [[0, 5, 0, 0, 5, 0]] * 3
    exact = copy_of(block, torch.float64)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(y_RSD.double(), in_loops(exact, x_RSD.double())[0], rtol=tolerance, atol=tolerance)
    for _ in range(3):
        torch.full((6, 8, 8), math.nan)
        found = gradients(block, x_RSD, block(x_RSD), None)
        for matrix in ("gate", "up", "down"):
            used = found[f"experts.{matrix}"].flatten(1).any(1)
            assert used.tolist() == [False, True, False, False, True, False]
            assert found[f"experts.{matrix}"].isfinite().all()


def test_run_experts_takes_tokens_in_the_order_of_experts():
    """Legend: C rows of tokens. Counts with gaps at the start, in the middle and at the end."""
    torch.manual_seed(0)
    count = [0, 3, 0, 0, 5, 1, 0]
    gate, up, down = (torch.randn(7, *size, dtype=torch.float64) for size in ((4, 6), (4, 6), (6, 4)))
    x_CD = torch.randn(9, 6, dtype=torch.float64)
    owner = [expert for expert, rows in enumerate(count) for _ in range(rows)]
    expected = [
        down[e] @ (gate[e] @ x * torch.sigmoid(gate[e] @ x) * (up[e] @ x)) for e, x in zip(owner, x_CD, strict=True)
    ]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        y_CD = run_experts(
            *(x.to(dtype) for x in (x_CD,)), torch.tensor(count), *(m.to(dtype) for m in (gate, up, down))
        )
        torch.testing.assert_close(y_CD.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_shared_experts_are_as_wide_as_so_many_experts(shared):
    block = random_block(MoEOptions(4, 2, shared=shared), d_expert=5)
    assert block.experts.gate.shape == block.experts.up.shape == (4, 5, 8)
    assert block.experts.down.shape == (4, 8, 5)
    if shared == 0:
        assert block.shared is None
    else:
        assert block.shared.down.weight.shape == (8, shared * 5)
        assert block.shared.gate_up.weight.shape == (2 * shared * 5, 8)


def test_a_token_runs_through_its_own_experts_only():
    """Spoiling an expert changes exactly the tokens that chose it."""
    block = random_block(MoEOptions(experts=5, top_k=2))
    x_RSD = torch.randn(20, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        before = block(x_RSD)
        chosen = [routing(tensors_of(block), "ffn", x, block.router.options)[1] for x in x_RSD.flatten(0, 1)]
        for expert in range(5):
            kept = block.experts.down[expert].clone()
            block.experts.down[expert] += 1.0
            changed = (block(x_RSD) - before).abs().amax(2).flatten() > 1e-9
            assert changed.tolist() == [expert in of_token for of_token in chosen]
            assert changed.any()
            assert not changed.all()
            block.experts.down[expert] = kept


@pytest.mark.parametrize("name", ["odd numbers", "softmax", "DeepSeek-V3"])
def test_bf16_routes_as_fp32(name):
    """Scores are made in fp32 of the bf16 numbers, so that close ones do not tie."""
    block = random_block(CASES[name], d=64, dtype=torch.bfloat16)
    x_RSD = torch.randn(50, 3, 64).bfloat16()
    weight_MK, expert_MK, _ = block.router(x_RSD)
    wide = copy_of(block, torch.float32)
    assert weight_MK.dtype == torch.float32
    expected = wide.router(x_RSD.float())
    assert expert_MK.equal(expected.expert_MK)
    torch.testing.assert_close(weight_MK, expected.weight_MK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["odd numbers", "softmax not renormalised", "DeepSeek-V3"])
def test_bias_moves_the_choice_and_not_the_weights(name):
    """A large bias forces experts; their weights are those of their scores without it, and it has no gradient."""
    options = CASES[name]
    torch.manual_seed(0)
    logits_RSE = torch.randn(20, 3, options.experts, dtype=torch.float64)
    forced = list(range(options.top_k))  # within one group
    bias_E = torch.zeros(options.experts, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        bias_E[forced] = 50.0
    (weight_MK, expert_MK, count_E), _ = route(logits_RSE.requires_grad_(), bias_E, options)
    assert expert_MK.sort(1).values.tolist() == [forced] * 60
    assert count_E.tolist() == [60 if expert in forced else 0 for expert in range(options.experts)]
    for weights, chosen, logits in zip(weight_MK, expert_MK.tolist(), logits_RSE.flatten(0, 1), strict=True):
        scores = softmax(list(logits)) if options.score == "softmax" else list(logits.sigmoid())
        total = sum(float(scores[expert].detach()) for expert in chosen) if options.renormalise else 1.0
        expected = [options.scale * float(scores[expert].detach()) / total for expert in chosen]
        assert weights.tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.grad(weight_MK.square().sum(), bias_E, allow_unused=True)[0] is None


@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 4),
    score=st.sampled_from(("sigmoid", "softmax")),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_choices_lie_in_the_best_groups(groups, size, score, seed, data):
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    options = MoEOptions(groups * size, top_k, groups=groups, top_groups=top_groups, score=score)
    g = torch.Generator().manual_seed(seed)
    logits_RSE = torch.randn(4, 2, options.experts, generator=g, dtype=torch.float64)
    bias_E = torch.randn(options.experts, generator=g, dtype=torch.float64)
    (_, expert_MK, count_E), record = route(logits_RSE, bias_E, options)
    scores = logits_RSE.sigmoid() if score == "sigmoid" else logits_RSE.softmax(-1)
    for biased, chosen in zip((scores + bias_E).flatten(0, 1).tolist(), expert_MK.tolist(), strict=True):
        assert len(set(chosen)) == top_k
        of_group = [sorted(biased[n * size : (n + 1) * size], reverse=True) for n in range(groups)]
        strength = [sum(best[:2]) for best in of_group]
        kept = sorted(range(groups), key=lambda n: -strength[n])[:top_groups]
        eligible = [expert for expert in range(options.experts) if expert // size in kept]
        assert set(chosen) == set(sorted(eligible, key=lambda expert: -biased[expert])[:top_k])
    counts = [expert_MK.flatten().tolist().count(expert) for expert in range(options.experts)]
    assert count_E.tolist() == counts == record.load_SE.sum(0).tolist()
    assert count_E.dtype == torch.int32


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("padded", [False, True])
def test_record_equals_loops(score, padded):
    """Loads by position, entropy and both losses; padding is routed, but no part of the record."""
    options = MoEOptions(5, 2, score=score, sequence_loss=0.7, z_loss=0.2)
    block = random_block(options)
    p, x_RSD = tensors_of(block), torch.randn(6, 4, 8, dtype=torch.float64)
    real_RS = torch.ones(6, 4, dtype=torch.bool)
    if padded:
        real_RS = torch.rand(6, 4) < 0.6
        real_RS[:, 0] = True
        real_RS[5] = False
    block.router.real_RS = real_RS if padded else None
    _, expert_MK, count_E = block.router(x_RSD)
    record = block.router.record
    assert not record.entropy.requires_grad
    load = torch.zeros(4, 5, dtype=torch.int64)
    entropy = 0.0
    for row in range(6):
        real = [slot for slot in range(4) if real_RS[row, slot]]
        for slot in real:
            scores, chosen, _ = routing(p, "ffn", x_RSD[row, slot], options)
            assert sorted(chosen) == sorted(expert_MK.view(6, 4, 2)[row, slot].tolist())
            load[slot, chosen] += 1
            shares = [float(s.detach()) / sum(float(s.detach()) for s in scores) for s in scores]
            entropy -= sum(share * math.log(share) for share in shares)
        tokens = [x_RSD[row, slot] for slot in real]
        expected = 0.7 * sequence_loss(p, "ffn", tokens, options) + 0.2 * z_loss(p, "ffn", tokens) if real else 0.0
        assert float(record.loss_R[row].detach()) == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-9)
    assert record.load_SE.tolist() == load.tolist()
    assert record.load_SE.dtype == torch.int64
    assert int(count_E.sum()) == 6 * 4 * 2
    assert float(record.entropy) == pytest.approx(entropy, rel=1e-9)


@pytest.mark.parametrize("name", ["sequence_loss", "z_loss"])
def test_gradient_of_each_auxiliary_loss(name):
    """By router weights and input; of z-loss against its closed form 2 lse softmax(logits) / S."""
    options = dataclasses.replace(MoEOptions(5, 2), **{name: 1.5})
    block = random_block(options)
    x_RSD = torch.randn(4, 3, 8, dtype=torch.float64).requires_grad_()
    weight_ED = block.router.weight
    block(x_RSD)
    found = torch.autograd.grad(block.router.record.loss_R.sum(), (x_RSD, weight_ED))
    expected = torch.autograd.grad(in_loops(block, x_RSD)[1].sum(), (x_RSD, weight_ED))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert ours.any()
    if name == "z_loss":
        logits_RSE = (x_RSD @ weight_ED.T).detach()
        by_logit = 1.5 * 2 * logits_RSE.logsumexp(-1, keepdim=True) * logits_RSE.softmax(-1) / 3
        torch.testing.assert_close(found[1], torch.einsum("rse,rsd->ed", by_logit, x_RSD.detach()))


def test_sequence_loss_is_one_when_balanced_and_more_when_not():
    """E / (K S) * counts times shares: 1 for equal scores, E / K where one choice takes everything."""
    options = MoEOptions(4, 1, sequence_loss=1.0, score="softmax")
    turns = 50.0 * torch.eye(4)[None]  # token s goes to expert s
    _, record = route(turns, torch.zeros(4), options)
    assert record.loss_R.tolist() == pytest.approx([1.0])
    _, record = route(turns[:, :1].expand(1, 4, 4), torch.zeros(4), options)
    assert record.loss_R.tolist() == pytest.approx([4.0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_balanced_bias_equals_a_loop(dtype):
    torch.manual_seed(0)
    bias_E, load_E = torch.randn(7), torch.tensor([4, 4, 5, 5, 0, 13, 4])  # the mean is 5, the median 4
    expected = []
    for bias, load in zip(bias_E.tolist(), load_E.tolist(), strict=True):
        expected.append(bias + (0.01 if load < 5 else -0.01 if load > 5 else 0.0))
    found = balanced_bias(bias_E, load_E.to(dtype), 0.01)
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    assert found.dtype == torch.float32
    assert found[2:4].equal(bias_E[2:4])


def test_balanced_bias_equals_megatron(monkeypatch):
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        moe_utils.parallel_state, "get_tensor_and_data_parallel_group", lambda with_context_parallel: None
    )
    torch.manual_seed(0)
    for _ in range(20):
        bias_E, load_E = torch.randn(8), torch.randint(0, 6, (8,)).double()
        expected = moe_utils.get_updated_expert_bias(load_E.clone(), bias_E, 0.001)
        torch.testing.assert_close(balanced_bias(bias_E, load_E, 0.001), expected.float(), rtol=0, atol=1e-7)


def test_balancing_evens_a_skewed_router():
    """From a router that prefers two experts of eight, the largest load falls from 4 times its share below 1.2."""
    options = MoEOptions(8, 2)
    torch.manual_seed(0)
    logits_RSE = torch.randn(500, 2, 8) + torch.tensor([3.0, 3, 0, 0, 0, 0, -1, -1])
    bias_E = torch.zeros(8)
    over_ideal = []
    for _ in range(200):
        load_E = route(logits_RSE, bias_E, options)[1].load_SE.sum(0).double()
        over_ideal.append(float(load_E.max() / load_E.mean()))
        bias_E = balanced_bias(bias_E, load_E, 0.005)
    assert over_ideal[0] > 3
    assert over_ideal[-1] < 1.2


def test_the_backward_pass_keeps_the_weights_themselves():
    """No view or copy of them: an engine that takes weights away between the passes could not free those."""
    moe = MoEOptions(experts=4, top_k=2, d_expert=8)
    module = SparseFFN(ModelOptions(d_model=16, n_heads=2, moe=moe))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.randn(3, 5, 16, requires_grad=True))
    matrices = {id(parameter) for parameter in module.experts.parameters()}
    of_experts = [tensor for tensor in kept if tensor.numel() == module.experts.gate.numel()]
    assert {id(tensor) for tensor in of_experts} == matrices
