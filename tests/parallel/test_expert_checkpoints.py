"""Checkpoints of models with experts: written beside training under one mix, read under another, every tensor equal,
ten further losses equal. 53 experts: padded to 54 or 56 where ranks share them.

Worlds of 4, 2 and 1 ranks, shared experts and whole ones, ZeRO stages 1, 2 and 3: each is read by each of the others.
test_parallel_checkpoint.py has all stages of a dense model, from two ranks to one and back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from golden import MODELS, ONE, OPTIMIZERS, Trained, global_batch, go_on, new_model
from safetensors.torch import load_file

from onetrain.model.decoder import SidDecoder
from onetrain.model.loss import training_loss
from onetrain.model.moe import routers
from onetrain.parallel.checkpoint import load, load_weights
from onetrain.parallel.checkpoint_saver import CheckpointSaver
from onetrain.parallel.checkpoint_store import FolderStore
from onetrain.parallel.engine import Engine
from onetrain.parallel.optimizer_state import gather
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

EXPERTS, BEFORE, FURTHER = 53, 3, 10
SPARSE = MODELS["sparse + auxiliary"]
OPTIONS = replace(SPARSE, moe=replace(SPARSE.moe, experts=EXPERTS, d_expert=4))
# Small steps, so that another order of sums (about 1e-7) stays below 1e-6 over ten steps.
CALM = replace(OPTIMIZERS["AdamW"], learning_rate=3e-4, embedding_learning_rate=1e-4, warmup_steps=1)


@dataclass(frozen=True)
class Mix:
    world_size: int
    expert_parallel: int
    zero_stage: int

    @property
    def name(self) -> str:
        return f"world{self.world_size}_ep{self.expert_parallel}_zero{self.zero_stage}"

    @property
    def parallel(self) -> ParallelOptions:
        return replace(ONE, expert_parallel=self.expert_parallel, zero_stage=self.zero_stage)  # type: ignore[arg-type]


Written = tuple[Path, dict[str, Trained]]  # where the checkpoints are; how each run went on
ALONE, DP2 = Mix(1, 1, 0), Mix(2, 1, 2)
EP2 = [Mix(2, 2, stage) for stage in (0, 1, 2, 3)]
EP2_DP2, EP4 = Mix(4, 2, 2), Mix(4, 4, 3)
PAIRS = [
    (EP2[1], EP2[3]),
    (EP2[3], EP2[1]),
    (EP2[1], DP2),
    (DP2, EP2[1]),
    (DP2, EP2[3]),
    (EP2[3], DP2),
    (EP2[0], EP2[2]),
    (ALONE, EP2[0]),
    (EP2[1], ALONE),
]
FOUR = [(EP2[1], EP2_DP2), (ALONE, EP2_DP2), (EP2_DP2, EP4), (EP4, DP2), (EP4, ALONE)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return tmp_path_factory.mktemp("written"), {}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    with WorkerPool(1, timeout_s=300) as one, WorkerPool(2, timeout_s=300) as two:
        yield {1: one, 2: two}


def new_engine(ranks: Ranks, mix: Mix, seed: int = 0) -> Engine:
    torch.use_deterministic_algorithms(True)
    model = new_model(OPTIONS)
    if seed:  # other weights, which a checkpoint must replace
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.normal_()
        for router in routers(model):
            router.e_score_correction_bias.normal_()
    return Engine(model, mix.parallel, CALM, ranks, 100)


def write(ranks: Ranks, folder: Path, mixes: list[Mix]) -> dict[str, Trained]:
    """Saves after some steps under every mix, while it goes on; the result is rank 0's."""
    further = {}
    for mix in mixes:
        engine = new_engine(ranks, mix)
        go_on(engine, global_batch, BEFORE)
        saver = CheckpointSaver(engine, FolderStore(folder))
        saver.save(mix.name, {"cursor": BEFORE})
        trained = go_on(engine, global_batch, FURTHER)
        saver.finish()
        engine.close()
        if trained is not None:
            further[mix.name] = trained
    return further


def read(ranks: Ranks, folder: Path, pairs: list[tuple[Mix, Mix]]) -> list[Trained | None]:
    """Loads the first mix's checkpoint under the second, compares every tensor, and goes on."""
    results = []
    for writer, reader in pairs:
        saved = {name: load_file(folder / writer.name / f"{name}.safetensors") for name in ("model", "optimizer")}
        engine = new_engine(ranks, reader, seed=9)
        assert load(engine, folder / writer.name) == {"cursor": BEFORE}
        assert engine.step == BEFORE
        full = gather(engine)
        if ranks.is_main:
            biases = {name for name in saved["model"] if name.endswith("e_score_correction_bias")}
            equal(full.pop("value"), {name: t for name, t in saved["model"].items() if name not in biases})
            equal({f"{kind}/{n}": t for kind, tensors in full.items() for n, t in tensors.items()}, saved["optimizer"])
        with engine.gathered() as module:
            equal(dict(module.state_dict()), saved["model"])
        for router, name in zip(routers(engine.module), sorted(n for n in saved["model"] if "bias" in n), strict=True):
            assert router.e_score_correction_bias.equal(saved["model"][name])
        assert {float(state["step"]) for state in engine.optimizer.state.values() if "step" in state} == {BEFORE}
        results.append(go_on(engine, global_batch, FURTHER))
        engine.close()
    return results


def equal(ours: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == saved.keys()
    for name, tensor in ours.items():
        assert tensor.equal(saved[name]), name


def check(pools: dict[int, WorkerPool], written: Written, pairs: list[tuple[Mix, Mix]]) -> None:
    folder, further = written
    for world_size, pool in pools.items():
        writers = dict.fromkeys(writer for writer, _ in pairs if writer.world_size == world_size)
        if missing := [mix for mix in writers if mix.name not in further]:
            further |= pool.run(write, folder, missing)[0]
    for world_size, pool in pools.items():
        here = [(writer, reader) for writer, reader in pairs if reader.world_size == world_size]
        for (writer, reader), ours in zip(here, pool.run(read, folder, here)[0], strict=True):
            theirs, told = further[writer.name], f"{writer.name} in {reader.name}: "
            torch.testing.assert_close(
                torch.tensor(ours.history),
                torch.tensor(theirs.history),
                rtol=2e-6,
                atol=0,
                msg=lambda text, told=told: told + text,
            )
            assert all(m.equal(t) for m, t in zip(ours.expert_ZMK, theirs.expert_ZMK, strict=True)), told


@pytest.mark.slow
def test_one_mix_reads_what_another_wrote(pools: dict[int, WorkerPool], written: Written) -> None:
    check(pools, written, PAIRS)
    check_the_file_is_the_model(written[0] / EP2[3].name)


def check_the_file_is_the_model(folder: Path) -> None:
    """A plain model of 53 experts reads it, without a trace of padding or of DeepSpeed."""
    model = new_model(OPTIONS)
    load_weights(model, folder)
    saved = load_file(folder / "model.safetensors")
    equal(model.state_dict(), saved)
    assert {len(saved[name]) for name in saved if "ffn.experts." in name or "router" in name} == {EXPERTS}
    moments = load_file(folder / "optimizer.safetensors")
    assert moments.keys() == {
        f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()
    }
    assert all(moments[f"exp_avg/{name}"].shape == parameter.shape for name, parameter in model.named_parameters())
    assert isinstance(model, SidDecoder)
    context, targets = global_batch(0)
    assert float(training_loss(model(context, targets), OPTIONS).loss.detach()) > 0


@pytest.mark.slow
def test_four_ranks_read_and_write(pools: dict[int, WorkerPool], written: Written) -> None:
    with WorkerPool(4, timeout_s=300) as four:
        check({**pools, 4: four}, written, FOUR)
