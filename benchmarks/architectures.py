"""Speed of the architectures at equal weights and equal data, and of beam search with and without MTP.

Training: samples (targets) per second, forward and backward, of the lazy decoder, the encoder-decoder and the naive
decoder-only reference: width 512, 8 blocks' worth of weights, 8192 codes a level, 512 context positions, 5 targets per
context and 1. Decoding: queries per second of OneLive's decoder with 6 and 3 main blocks, context processing included.
Arms take turns, each keeps its fastest round. Usage:

    python benchmarks/architectures.py [--threads 2] [--rounds 3] [--precision fp32 bf16] [--part training decoding]

Writes runs/benchmarks/architectures.json with versions and machine, and prints both tables.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from onetrain.launcher.console import print_message, print_table
from onetrain.launcher.environment import environment
from onetrain.model.beam_search import beam_search
from onetrain.model.build import build
from onetrain.model.decoder import SidDecoder
from onetrain.model.flops import forward_flops
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.loss import training_loss
from onetrain.model.options import ModelOptions, MTPOptions, Vocabulary
from onetrain.model.trie import SidTrie

EVENTS = 511  # with the static position, 512 context positions
ITEMS = 100_000
VOCABULARY = Vocabulary(codes=(8192, 8192, 8192), features={"item": ITEMS}, pathways={"history": EVENTS})
LAZY = ModelOptions(d_model=512, n_layers=8, n_heads=8, embed_dim=32)
TRAINING = {  # 144 d^2 weights in the blocks of every arm, up to norms
    "lazy decoder": LAZY,
    "encoder-decoder": replace(
        LAZY, architecture="encoder_decoder", cross_attention="projected_kv", encoder_layers=4, n_layers=4
    ),
    "naive decoder-only": replace(LAZY, architecture="decoder_only", n_layers=9),
}
ROWS = {"lazy decoder": 32, "encoder-decoder": 4, "naive decoder-only": 4}  # contexts of a round's batch
ONELIVE = replace(LAZY, cross_attention="projected_kv", output_gate=True, qk_norm=True)
BEAMS, QUERIES = 128, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_context(rows: int) -> Context:
    """Full histories of random items."""
    index_BN = torch.arange(EVENTS).repeat(rows, 1)
    sid_BNL = torch.stack([torch.randint(codes, (rows, EVENTS)) for codes in VOCABULARY.codes], dim=-1)
    features = {"item": torch.randint(ITEMS, (rows, EVENTS))}
    return Context({"history": Events(sid_BNL, index_BN, torch.full((rows,), EVENTS), features)})


def random_targets(rows: int, slots: int) -> Targets:
    """Targets that see the whole history, as the items impressed by one request do."""
    sid_BTL = torch.stack([torch.randint(codes, (rows, slots)) for codes in VOCABULARY.codes], dim=-1)
    return Targets(sid_BTL, torch.full((rows, slots), EVENTS), torch.ones(rows, slots))


def fastest(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of every arm; the arms take turns, and warm up once."""
    seconds = dict.fromkeys(arms, float("inf"))
    for number in range(rounds + 1):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            if number > 0:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def training_arm(model: SidDecoder, rows: int, slots: int) -> Callable[[], None]:
    """One forward and backward over a fixed batch."""
    context, targets = random_context(rows), random_targets(rows, slots)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        training_loss(model(context, targets), model.options).loss.backward()

    return run


def block_weights(model: SidDecoder) -> int:
    """Parameters of all blocks and MTP modules."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(("blocks", "encoder", "mtp")))


def measure_training(dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Samples per second of every arm at 5 targets per context and at 1."""
    models = {name: build(options, VOCABULARY).to(dtype) for name, options in TRAINING.items()}
    records: list[dict[str, object]] = []
    for slots in (5, 1):
        print_message(f"training, {slots} targets per context, {dtype}")
        arms = {name: training_arm(model, ROWS[name], slots) for name, model in models.items()}
        seconds = fastest(arms, rounds)
        speed = {name: ROWS[name] * slots / seconds[name] for name in models}
        for name, model in models.items():
            flops = forward_flops(model.options, VOCABULARY).training(
                targets=slots, target_positions=slots * (EVENTS + 1), rows=1, events={"history": EVENTS}
            )
            records.append(
                {
                    "arm": name,
                    "targets_per_context": slots,
                    "block_weights": block_weights(model),
                    "samples_per_s": speed[name],
                    "lazy_over_this": speed["lazy decoder"] / speed[name],
                    "gflops_per_sample": flops / slots / 1e9,
                    "gflops_per_s": flops / slots * speed[name] / 1e9,
                }
            )
    return records


def measure_decoding(dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """Queries per second with the plain decoder and with MTP, over one catalogue and beam."""
    codes_IL = torch.stack([torch.randint(codes, (ITEMS,)) for codes in VOCABULARY.codes], dim=-1)
    trie, context = SidTrie(codes_IL, VOCABULARY.codes), random_context(QUERIES)
    records: list[dict[str, object]] = []
    for layers in (6, 3):
        print_message(f"decoding, {layers} main blocks, {dtype}")
        plain = replace(ONELIVE, n_layers=layers)
        variants = {"next token": plain, "MTP": replace(plain, mtp=MTPOptions(enabled=True))}
        models = {name: build(options, VOCABULARY).to(dtype).eval() for name, options in variants.items()}

        def arm(model: SidDecoder) -> Callable[[], None]:
            return lambda: _search(model, context, trie)

        with torch.no_grad():
            context_only = fastest({"context": lambda m=models["MTP"]: m.start(context, {})}, rounds)["context"]  # type: ignore[misc]
        seconds = fastest({name: arm(model) for name, model in models.items()}, rounds)
        for name, model in models.items():
            records.append(
                {
                    "main_blocks": layers,
                    "arm": name,
                    "block_weights": block_weights(model),
                    "queries_per_s": QUERIES / seconds[name],
                    "gain": seconds["next token"] / seconds[name] - 1,
                    "context_share": context_only / seconds[name],
                }
            )
    return records


def _search(model: SidDecoder, context: Context, trie: SidTrie) -> None:
    beam_search(model, context, trie, BEAMS)


def show(title: str, records: list[dict[str, object]]) -> None:
    """Print one table."""
    rows = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in record.values()] for record in records]
    print_table(title, list(records[0]), rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--part", nargs="+", choices=["training", "decoding"], default=["training", "decoding"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/architectures.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    summary: dict[str, object] = {"threads": options.threads, "beams": BEAMS, "queries": QUERIES}
    for precision in options.precision:
        for part in options.part:
            measure = {"training": measure_training, "decoding": measure_decoding}[part]
            records = measure(DTYPES[precision], options.rounds)
            summary[f"{part}_{precision}"] = records
            show(f"{part}, {precision}, {options.threads} threads", records)
    summary["environment"] = environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_message(f"written to {options.out}")


if __name__ == "__main__":
    main()
