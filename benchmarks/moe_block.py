"""The sparse block beside a dense FFN of equal active width, and beside the same experts in a loop.

Forward and backward of one block. All arms see the same tokens: the sparse block (grouped matrix products), a loop
over its experts with the same weights and routing, and a SwiGLU as wide as the experts that a token runs through,
shared ones included. Arms take turns; the table gives each arm's median, and ratios of arms of the same run. Usage:

    python benchmarks/moe_block.py [--device cpu] [--threads 2] [--rounds 7] [--precision fp32 bf16]
                                   [--experts 8 16 54] [--tokens 512 4096 16384] [--d-model 512] [--d-expert 256]

Writes runs/benchmarks/moe_block.json with versions and machine, and prints the table. Routing is not forced: weights
are random, so loads are as uneven as a new router's; the table says how uneven.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import report
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.launcher.console import print_message
from onetrain.model.ffn import SwiGLU
from onetrain.model.moe import SparseFFN
from onetrain.model.options import ModelOptions, MoEOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOTS = 3  # tokens of a target


class LoopedFFN(nn.Module):
    """A sparse block's own weights and routing, one expert after the other."""

    def __init__(self, block: SparseFFN) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_RSD: Tensor) -> Tensor:
        """As the block."""
        experts = self.block.experts
        weight_MK, expert_MK, _ = self.block.router(x_RSD)
        x_MD = x_RSD.flatten(0, 1)
        y_MD = torch.zeros(x_MD.shape, dtype=weight_MK.dtype, device=x_MD.device)
        matrices = zip(experts.gate.unbind(), experts.up.unbind(), experts.down.unbind(), strict=True)
        for expert, (gate, up, down) in enumerate(matrices):
            token, choice = (expert_MK == expert).nonzero(as_tuple=True)
            x_CD = x_MD[token]
            y_CD = F.linear(F.silu(F.linear(x_CD, gate)) * F.linear(x_CD, up), down)
            y_MD.index_add_(0, token, y_CD * weight_MK[token, choice, None])
        y_RSD = y_MD.to(x_MD.dtype).view_as(x_RSD)
        return y_RSD if self.block.shared is None else y_RSD + self.block.shared(x_RSD)


def step(module: nn.Module, x_RSD: Tensor, gradient_RSD: Tensor) -> Callable[[], None]:
    """One forward and backward."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x_RSD.grad = None
        module(x_RSD).backward(gradient_RSD)
        if x_RSD.is_cuda:
            torch.cuda.synchronize()

    return run


def measure(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round of every arm; the arms take turns, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            if number > 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def compare(experts: int, tokens: int, precision: str, options: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    torch.manual_seed(0)
    moe = MoEOptions(experts, options.top_k, shared=options.shared, d_expert=options.d_expert)
    width = (options.top_k + options.shared) * options.d_expert
    block = SparseFFN(ModelOptions(d_model=options.d_model, n_heads=1, moe=moe))
    dense = SwiGLU(options.d_model, width)
    for parameter in (*block.parameters(), *dense.parameters()):
        nn.init.normal_(parameter, std=0.02)
    block, dense = (m.to(options.device, DTYPES[precision]) for m in (block, dense))
    shape = (tokens // SLOTS, SLOTS, options.d_model)
    x_RSD, gradient_RSD = (torch.randn(shape, device=options.device, dtype=DTYPES[precision]) for _ in range(2))
    x_RSD.requires_grad_()
    looped = LoopedFFN(block)
    with torch.no_grad():
        expected, found = looped(x_RSD).double(), block(x_RSD).double()
        error = float((found - expected).norm() / expected.norm())
        _, _, count_E = block.router(x_RSD)
    modules = {"dense": dense, "sparse": block, "loop": looped}
    times = measure({name: step(module, x_RSD, gradient_RSD) for name, module in modules.items()}, options.rounds)
    median = {name: statistics.median(of_arm) for name, of_arm in times.items()}
    flops = 3 * 2 * 3 * shape[0] * SLOTS * options.d_model * width  # forward and backward of three matrices
    return {
        "precision": precision,
        "experts": experts,
        "tokens": shape[0] * SLOTS,
        "dense_ms": median["dense"],
        "sparse_ms": median["sparse"],
        "loop_ms": median["loop"],
        "sparse_spread_ms": max(times["sparse"]) - min(times["sparse"]),
        "sparse_over_dense": median["sparse"] / median["dense"],
        "loop_over_sparse": median["loop"] / median["sparse"],
        "sparse_gflops_per_s": flops / median["sparse"] / 1e6,
        "load_max_over_ideal": float(count_E.max() / count_E.float().mean()),
        "sparse_against_loop": error,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 54])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-expert", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/moe_block.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for precision in options.precision:
        for experts in options.experts:
            for tokens in options.tokens:
                print_message(f"{precision}, {experts} experts, {tokens} tokens")
                records.append(compare(experts, tokens, precision, options))
    title = (
        f"one block, forward + backward: width {options.d_model}, experts of {options.d_expert}, top {options.top_k} "
        f"and {options.shared} shared; median of {options.rounds}, {options.device}, {options.threads} threads"
    )
    report(title, records, options)


if __name__ == "__main__":
    main()
