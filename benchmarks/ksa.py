"""One layer's summary attention beside causal and sliding-window attention: time and memory against length.

Forward and backward of the attention alone (queries, keys and values are given). Arms, which take turns:

causal   torch's `scaled_dot_product_attention(is_causal=True)`, its flash kernel
sliding  the same function over a band: queries of one window, keys of two, the same window as KSA
ksa      text rows to window and old summaries, summary rows to their chunks, by the kernel that training uses

`limit` is the ratio of score pairs, causal over KSA: the speedup that pairs alone allow. `floor_ms` is what the
products of KSA's pairs take at the speed of one large matrix product, measured in the same run. Memory is the growth of
the peak resident set (CPU, a fresh process for each) or of the peak allocation (GPU). Usage:

    python benchmarks/ksa.py [--device cpu] [--precision fp32] [--threads 2] [--rounds 3] [--chunk 8 32]
                             [--lengths 1024 2048 4096 8192 16384 32768] [--heads 4] [--head-width 64]
                             [--parts attention decoding]

Writes runs/benchmarks/ksa.json and ksa_decoding.json with versions and machine, and prints the tables: attention,
growth, decoding. On two CPU cores it takes a quarter of an hour.
"""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import report
from torch import Tensor
from torch.nn import functional as F

from onetrain.launcher.console import print_message, print_table
from onetrain.model.attention import KeyValue
from onetrain.model.ksa.attention import Heads, own_chunk_attention
from onetrain.model.ksa.decode import prefill, step
from onetrain.model.ksa.kernels import attention, kernel_for
from onetrain.model.ksa.layout import Layout, score_pairs
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.options import KSAOptions

ARMS = ("causal", "sliding", "ksa")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = 7  # matrix products of a pair: two forward, five backward


def arm(name: str, length: int, chunk: int, options: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward of one kind of attention."""
    torch.manual_seed(0)
    window = options.window_tokens
    kind = {"device": options.device, "dtype": DTYPES[options.precision]}

    def heads(rows: int) -> list[Tensor]:
        shape = (options.heads, rows, options.head_width)
        return [torch.randn(shape, requires_grad=True, **kind) for _ in range(3)]

    text = heads(length)
    leaves = text
    if name == "ksa":
        summary = heads(length // chunk * options.summaries)
        leaves = text + summary

    def forward() -> list[Tensor]:
        if name == "causal":
            return [F.scaled_dot_product_attention(*(x[None] for x in text), is_causal=True)]
        if name == "sliding":
            return [sliding(*text, window)]
        kv, old = KeyValue(*text[1:]), Heads(*summary)
        layout = Layout.of([length], chunk, options.summaries, options.device)  # a batch makes it once, for all layers
        own = own_chunk_attention(old, kv, layout.chunk_text_ZC, options.summaries)
        return [attention(text[0], kv, old.kv, layout.ranges(window // chunk)), own]

    def run() -> None:
        outputs = forward()
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        if options.device == "cuda":
            torch.cuda.synchronize()

    return run


def sliding(q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, window: int) -> Tensor:
    """Each query sees itself and the `window` keys before it."""
    length = q_HTK.shape[1]
    if length <= window:
        return F.scaled_dot_product_attention(q_HTK[None], k_HTK[None], v_HTK[None], is_causal=True)
    q_XHQK = q_HTK.unflatten(1, (-1, window)).transpose(0, 1)
    banded = (F.pad(x, (0, 0, window, 0)).unfold(1, 2 * window, window).permute(1, 0, 3, 2) for x in (k_HTK, v_HTK))
    place_Q, place_J = torch.arange(window, device=q_HTK.device), torch.arange(2 * window, device=q_HTK.device) - window
    distance_QJ = place_Q[:, None] - place_J
    seen_XQJ = ((distance_QJ >= 0) & (distance_QJ <= window)).expand(len(q_XHQK), -1, -1).clone()
    seen_XQJ[0, :, :window] = False  # before the first key
    return F.scaled_dot_product_attention(q_XHQK, *banded, attn_mask=seen_XQJ[:, None])


def peak_bytes(name: str, length: int, chunk: int, options: argparse.Namespace) -> float:
    """Growth of the peak by one forward and backward."""
    if options.device == "cuda":
        run = arm(name, length, chunk, options)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--peak", name, str(length), str(chunk), *forwarded(options)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(name: str, length: int, chunk: int, options: argparse.Namespace) -> None:
    """What a process of `peak_bytes` does: a small round loads what is loaded once, then the round that counts."""
    arm(name, 4 * chunk, chunk, options)()
    run = arm(name, length, chunk, options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set begins anew
    before = resident()["VmRSS"]
    run()
    print((resident()["VmHWM"] - before) * 1024)


def resident() -> dict[str, int]:
    """Kilobytes of this process by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines) if name.startswith("Vm")
    }


def forwarded(options: argparse.Namespace) -> list[str]:
    """The options that shape an arm."""
    names = ("device", "precision", "threads", "heads", "head_width", "summaries", "window_tokens")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def product_speed(options: argparse.Namespace) -> float:
    """FLOPs per second of one large matrix product."""
    size = 8192 if options.device == "cuda" else 2048
    x = torch.randn(size, size, device=options.device, dtype=DTYPES[options.precision])

    def run() -> float:
        started = time.perf_counter()
        x @ x
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return 2 * size**3 / min(run() for _ in range(5))


def compare(length: int, chunk: int, speed: float, options: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    runs = {name: arm(name, length, chunk, options) for name in ARMS}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number > 0:  # the first round warms up
                times[name].append((time.perf_counter() - started) * 1e3)
    del runs
    ms = {name: statistics.median(of_arm) for name, of_arm in times.items()}
    pairs = score_pairs(length, chunk, options.summaries, options.window_tokens // chunk)
    limit, speedup = length * (length + 1) / 2 / pairs, ms["causal"] / ms["ksa"]
    return {
        "chunk": chunk,
        "length": length,
        "pairs": pairs,
        "limit": limit,
        **{f"{name}_ms": ms[name] for name in ARMS},
        "speedup": speedup,
        "of_limit": speedup / limit,
        "floor_ms": PASSES * 2 * options.head_width * options.heads * pairs / speed * 1e3,
        "spread": max(max(t) / min(t) for t in times.values()),
        **{f"{name}_MB": peak_bytes(name, length, chunk, options) / 1e6 for name in ARMS},
    }


def growth(records: list[dict]) -> list[list[str]]:
    """Exponents of time, memory and pairs between consecutive lengths."""
    rows = []
    for before, after in itertools.pairwise(records):
        if before["chunk"] == after["chunk"]:
            step = math.log(after["length"] / before["length"])
            of = {k: math.log(after[k] / before[k]) / step for k in ("pairs", "ksa_ms", "causal_ms", "ksa_MB")}
            rows.append([str(after["chunk"]), f"{before['length']} to {after['length']}"])
            rows[-1] += [f"{exponent:.2f}" for exponent in of.values()]
    return rows


def decoding(options: argparse.Namespace) -> list[dict]:
    """Time of appending one event to a history, mean over whole chunks: one event of a chunk takes summaries along."""
    records, width, device = [], options.heads * options.head_width, torch.device(options.device)
    for layers in (("ksa",) * 4, ("ksa", "ksa", "ksa", "full"), ("full",) * 4):
        ksa = KSAOptions(width=width, heads=options.heads, layers=layers, window=options.window_tokens // 8)
        stack = KSAStack(ksa, 1e-6).to(device).eval()
        for length in options.lengths:
            history = prefill(stack, torch.randn(length, width, device=device), stack.layout([length], device))
            times = []
            for _ in range(10):
                started = time.perf_counter()
                for _ in range(ksa.chunk):
                    step(stack, history, torch.randn(1, width, device=device))
                times.append((time.perf_counter() - started) * 1e3 / ksa.chunk)
            rows = [int(filled_B) for filled_B in history.rows]
            records.append(
                {
                    "layers": " ".join(layers),
                    "length": length,
                    "rows_first_layer": rows[0],
                    "rows_last_layer": rows[-1],
                    "append_ms": statistics.median(times[1:]),  # the first warms up
                }
            )
    return records


def print_attention(options: argparse.Namespace) -> None:
    """Time, memory and growth of all arms at all lengths."""
    speed, records = product_speed(options), []
    for chunk in options.chunk:
        for length in options.lengths:
            print_message(f"chunk {chunk}, {length} tokens")
            records.append(compare(length, chunk, speed, options))
    kernel = kernel_for("auto", torch.device(options.device))
    report(
        f"attention of one layer, forward + backward: {options.heads} heads of {options.head_width}, window of "
        f"{options.window_tokens} tokens, {options.precision}, {options.device}, {options.threads} threads, kernel "
        f"{kernel}, median of {options.rounds}; a large product runs at {speed / 1e9:.0f} GFLOP/s",
        records,
        options,
    )
    exponents = growth(records)
    print_table("growth: exponent of length", ["chunk", "lengths", "pairs", "ksa ms", "causal ms", "ksa MB"], exponents)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--chunk", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--summaries", type=int, default=1)
    parser.add_argument("--window-tokens", type=int, default=1024, help="W * C, the same for every chunk size")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--parts", nargs="+", choices=("attention", "decoding"), default=["attention", "decoding"])
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ksa.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        name, length, chunk = options.peak
        print_peak(name, int(length), int(chunk), options)
        return
    if "attention" in options.parts:
        print_attention(options)
    if "decoding" in options.parts:
        print_message("appending events")
        where = options.out.with_name(f"{options.out.stem}_decoding.json")
        report(
            "appending one event, width as above",
            decoding(options),
            argparse.Namespace(**vars(options) | {"out": where}),
        )


if __name__ == "__main__":
    main()
