"""Checkpoints: every ZeRO stage and world size reads what any other wrote, exactly; damage and full disks are named."""

import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_cases import ADAMW, PARALLEL, SGD, TOTAL_STEPS, global_batch, loss_fn, new_model, share, weight_fn
from safetensors.torch import load_file
from torch import Tensor, nn

from onetrain.parallel import process_group
from onetrain.parallel.checkpoint import latest, load, load_weights, read_state, save, step_folder
from onetrain.parallel.checkpoint_store import FolderStore
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.optimizer_state import gather
from onetrain.parallel.options import OptimizerOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

STAGES = (0, 1, 2, 3)
# Small steps, so that another order of sums (about 1e-7) stays below 1e-6 over ten steps.
CALM = replace(ADAMW, learning_rate=2e-3, embedding_learning_rate=5e-4)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    with WorkerPool(1) as one, WorkerPool(2) as two:
        yield {1: one, 2: two}


@pytest.fixture
def alone() -> Iterator[Ranks]:
    yield process_group.start(60)
    process_group.stop()


def new_engine(
    ranks: Ranks, stage: int, optimizer: OptimizerOptions = CALM, seed: int = 0, **options: object
) -> Engine:
    torch.use_deterministic_algorithms(True)
    parallel = replace(PARALLEL, zero_stage=stage, **options)
    return Engine(new_model(seed), parallel, optimizer, ranks, TOTAL_STEPS)


def train(engine: Engine, steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of the next `steps` steps."""
    history = []
    for step in range(engine.step, engine.step + steps):
        parts = share(global_batch(step), engine.ranks.rank, engine.ranks.world_size, engine.mesh.accumulation_steps)
        result = engine.train_step(parts, loss_fn, weight_fn)
        history.append((result.loss, result.grad_norm))
    return history


def save_and_go_on(ranks: Ranks, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Saves after 5 steps at every stage, and returns the ten further losses under the checkpoint's name."""
    further = {}
    for stage in STAGES:
        engine = new_engine(ranks, stage)
        train(engine, 5)
        path = folder / f"stage{stage}_world{ranks.world_size}"
        save(engine, path, {"cursor": 5, "stage": stage})
        further[path.name] = train(engine, 10)
        engine.close()
    return further


def load_and_go_on(ranks: Ranks, folder: Path, names: list[str]) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Loads every checkpoint at every stage, compares all tensors exactly, and returns the ten further losses."""
    further = {}
    for name in names:
        model, moments = (
            load_file(folder / name / "model.safetensors"),
            load_file(folder / name / "optimizer.safetensors"),
        )
        for stage in STAGES:
            engine = new_engine(ranks, stage, seed=99)
            assert load(engine, folder / name) == {"cursor": 5, "stage": int(name[5])}
            assert engine.step == 5
            full = gather(engine)
            if ranks.is_main:
                check_equal(full.pop("value"), model)
                check_equal({f"{kind}/{n}": t for kind, tensors in full.items() for n, t in tensors.items()}, moments)
            with engine.gathered() as module:
                check_equal(dict(module.named_parameters()), model)
                assert torch.equal(module.seen, model["seen"])
            assert {float(state["step"]) for state in engine.optimizer.state.values() if "step" in state} == {5.0}
            further[name, stage] = train(engine, 10)
            engine.close()
    return further


def check_equal(ours: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    assert set(ours) == set(saved) - {"seen"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (1, 2)])
def test_any_stage_and_world_size_loads_any_other(
    saved_by: int, loaded_by: int, pools: dict[int, WorkerPool], tmp_path: Path
) -> None:
    further = pools[saved_by].run(save_and_go_on, tmp_path)[0]
    loaded = pools[loaded_by].run(load_and_go_on, tmp_path, list(further))[0]
    assert len(loaded) == len(STAGES) ** 2
    for (name, _), history in loaded.items():
        torch.testing.assert_close(torch.tensor(history), torch.tensor(further[name]), rtol=1e-6, atol=0)


def straight_and_resumed(ranks: Ranks, folder: Path, cases: list[tuple[int, OptimizerOptions, dict]]) -> None:
    """40 steps against 20, save, a new engine, 20: to the last bit."""
    for number, (stage, optimizer, options) in enumerate(cases):
        engine = new_engine(ranks, stage, optimizer, **options)
        straight = train(engine, 40)
        expected, seen = gather(engine), engine.module.seen.clone()
        engine.close()
        first = new_engine(ranks, stage, optimizer, **options)
        history = train(first, 20)
        save(first, folder / str(number), {})
        first.close()
        second = new_engine(ranks, stage, optimizer, seed=99, **options)
        load(second, folder / str(number))
        history += train(second, 20)
        assert history == straight, (stage, options)
        for kind, tensors in gather(second).items():
            check_equal(tensors, expected[kind])
        assert torch.equal(second.module.seen, seen)
        second.close()


@pytest.mark.slow
def test_resume_is_bit_for_bit(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    accumulating = {"micro_batch_size": 2}
    cases = [(stage, ADAMW, accumulating) for stage in STAGES]
    cases += [(stage, ADAMW, {"precision": "bf16"}) for stage in (1, 2, 3)]
    round_robin = {"zero_optimization": {"round_robin_gradients": True}}
    cases += [(1, SGD, {}), (3, ADAMW, {"offload_optimizer": True}), (2, ADAMW, {"deepspeed": round_robin})]
    pools[2].run(straight_and_resumed, tmp_path, cases)


def bf16_masters(ranks: Ranks, folder: Path) -> None:
    """A checkpoint of one bf16 stage in another: masters exact, the module's weights their bf16 rounding."""
    engine = new_engine(ranks, 1, precision="bf16")
    train(engine, 5)
    save(engine, folder / "bf16", {})
    engine.close()
    model = load_file(folder / "bf16" / "model.safetensors")
    assert any(not torch.equal(value, value.bfloat16().float()) for name, value in model.items() if name != "seen")
    for stage in (1, 2, 3):
        other = new_engine(ranks, stage, seed=99, precision="bf16")
        load(other, folder / "bf16")
        full = gather(other)
        if ranks.is_main:
            check_equal(full["value"], model)
        with other.gathered() as module:
            check_equal(dict(module.named_parameters()), {name: value.bfloat16() for name, value in model.items()})
        other.close()


def test_bf16_stages_share_fp32_masters(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    pools[2].run(bf16_masters, tmp_path)


def frozen_and_warm(ranks: Ranks, folder: Path) -> None:
    for stage in STAGES:
        model = new_model(0)
        model.hidden.requires_grad_(False)
        before = model.hidden.weight.detach().clone()
        engine = Engine(model, replace(PARALLEL, zero_stage=stage), ADAMW, ranks, TOTAL_STEPS)
        train(engine, 2)
        save(engine, folder / f"frozen{stage}", {"name": "warm"})
        engine.close()
        saved = load_file(folder / f"frozen{stage}" / "model.safetensors")
        assert torch.equal(saved["hidden.weight"], before)
        warm = new_engine(ranks, stage, seed=99)
        assert load_weights(warm, folder / f"frozen{stage}") == {"name": "warm"}
        assert warm.step == 0
        with warm.gathered() as module:
            check_equal(dict(module.named_parameters()), saved)
        full = gather(warm)
        if ranks.is_main:
            check_equal(full.pop("value"), saved)
            assert not any(tensor.any() for tensors in full.values() for tensor in tensors.values())
        train(warm, 1)
        warm.close()


def test_frozen_parameters_are_kept_and_weights_warm_start_another_run(
    pools: dict[int, WorkerPool], tmp_path: Path
) -> None:
    pools[2].run(frozen_and_warm, tmp_path)


def full_disk(ranks: Ranks, folder: Path) -> str:
    """Saves once, then again where no file may grow beyond a kilobyte."""
    engine = new_engine(ranks, 2)
    train(engine, 1)
    save(engine, folder / "best", {"score": 1})
    train(engine, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        save(engine, folder / "best", {"score": 2})
    except ParallelError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        engine.close()
    return "saved"


def test_full_disk_is_an_error_on_every_rank_and_keeps_the_old_checkpoint(
    pools: dict[int, WorkerPool], tmp_path: Path, alone: Ranks
) -> None:
    for message in pools[2].run(full_disk, tmp_path):
        assert f"Cannot write checkpoint {tmp_path / 'best'}" in message
        assert "Free space" in message
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    engine = new_engine(alone, 0)
    assert load(engine, tmp_path / "best") == {"score": 1}
    assert engine.step == 1


def saved_alone(alone: Ranks, folder: Path, steps: int = 1) -> Path:
    engine = new_engine(alone, 0)
    train(engine, steps)
    save(engine, folder, {"cursor": steps})
    engine.close()
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_damaged_file_is_named(name: str, damage: str, alone: Ranks, tmp_path: Path) -> None:
    folder = saved_alone(alone, tmp_path / "checkpoint")
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        position = 2 if name == "state.json" else len(content) - 3
        (folder / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    engine = new_engine(alone, 0)
    with pytest.raises(ParallelError, match=name.replace(".", r"\.")):
        load(engine, folder)
    with pytest.raises(ParallelError, match=name.replace(".", r"\.")):
        load_weights(new_model(0), folder)


def test_parameters_that_do_not_match_are_named(alone: Ranks, tmp_path: Path) -> None:
    folder = saved_alone(alone, tmp_path / "checkpoint")
    model = new_model(1)
    model.out = nn.Linear(33, 9)
    model.extra = nn.Linear(2, 2, bias=False)
    del model.norm
    with pytest.raises(ParallelError) as caught:
        load_weights(model, folder)
    for problem in (
        "extra.weight is missing",
        "norm.weight is unexpected",
        "out.weight has shape (7, 33) instead of (9, 33)",
    ):
        assert problem in str(caught.value)
    engine = Engine(model, PARALLEL, CALM, alone, TOTAL_STEPS)
    with pytest.raises(ParallelError, match=r"extra\.weight is missing"):
        load(engine, folder)


def test_another_optimizer_is_refused(alone: Ranks, tmp_path: Path) -> None:
    folder = saved_alone(alone, tmp_path / "checkpoint")
    with pytest.raises(ParallelError, match="state of optimizer adamw; this run uses sgd"):
        load(new_engine(alone, 0, SGD), folder)


def test_plain_module_gets_weights_and_buffers(alone: Ranks, tmp_path: Path) -> None:
    engine = new_engine(alone, 0)
    train(engine, 2)
    save(engine, tmp_path / "checkpoint", {"cursor": 2})
    module = new_model(5)
    assert load_weights(module, tmp_path / "checkpoint") == {"cursor": 2}
    assert read_state(tmp_path / "checkpoint") == {"cursor": 2}
    check_equal(dict(module.named_parameters()), dict(engine.module.named_parameters()))
    assert module.seen == engine.module.seen > 0


def test_checkpoint_before_the_first_step_resumes(alone: Ranks, tmp_path: Path) -> None:
    engine = new_engine(alone, 1)
    save(engine, tmp_path / "checkpoint", {})
    straight = train(engine, 3)
    engine.close()
    again = new_engine(alone, 1, seed=99)
    load(again, tmp_path / "checkpoint")
    assert train(again, 3) == straight


def test_latest_and_prune(alone: Ranks, tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    folder = saved_alone(alone, step_folder(tmp_path, 10))
    assert folder.name == "step_00000010"
    for step in (20, 30, 100, 200):
        shutil.copytree(folder, step_folder(tmp_path, step))
    shutil.copytree(folder, tmp_path / "best")
    (step_folder(tmp_path, 300)).mkdir()  # without state.json it is no checkpoint
    assert latest(tmp_path) == step_folder(tmp_path, 200)
    store = FolderStore(tmp_path)
    assert store.prune(2, {"step_00000020"}) == ["step_00000010", "step_00000030"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["best", "step_00000020", "step_00000100", "step_00000200", "step_00000300"]
    assert store.prune(0, {"step_00000100"}) == ["step_00000020", "step_00000200"]
