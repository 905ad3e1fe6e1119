"""`onetrain debug`: one batch is learnt by heart, and a parameter that cannot learn is found."""

import re

import pytest
import torch
from torch import nn
from train_cases import changed, records
from typer.testing import CliRunner

from onetrain.launcher import debug as module
from onetrain.launcher.cli import app
from onetrain.launcher.config import run_folder, save_config
from onetrain.launcher.debug import check_gradients, debug
from onetrain.launcher.errors import ConfigError
from onetrain.model.options import MoEOptions
from onetrain.parallel.errors import ParallelError

EXPERTS = MoEOptions(experts=4, d_expert=16)


def debug_run(config):
    return changed(config, name="debug", storage_path=str(run_folder(config)))


def test_one_batch_is_learnt_by_heart_and_each_call_begins_anew(tiny, tmp_path):
    config = changed(tiny, train__steps=150, optimizer__learning_rate=0.01, optimizer__schedule="constant")
    config = changed(config, parallel__micro_batch_size=None)
    save_config(config, tmp_path / "job.yaml")
    done = CliRunner().invoke(app, ["debug", str(tmp_path / "job.yaml"), "--overfit", "150"])
    assert done.exit_code == 0, done.output
    assert "parameters receive finite gradients" in done.stderr
    first = [record["loss"] for record in records(debug_run(config))]
    assert len(first) == 150
    assert first[0] > 2.0
    assert first[-1] < 0.1
    assert float(re.search(r"one batch, 150 steps: loss ([\d.]+)", done.stderr)[1]) == pytest.approx(
        first[-1], abs=1e-4
    )
    assert [path.name for path in run_folder(config).iterdir()] == ["debug"]

    debug(config, steps=3, overfit=False)
    again = [record["loss"] for record in records(debug_run(config))]
    assert len(again) == 3
    assert again[0] == first[0]
    assert again[2] != first[2]  # another batch


@pytest.fixture
def model_with(monkeypatch):
    """Changes the model that the gradient check builds."""
    build_model = module.build_model

    def put(change):
        def build(config, data):
            model = build_model(config, data)
            change(model)
            return model

        monkeypatch.setattr(module, "build_model", build)

    return put


def test_a_dead_parameter_is_named(tiny, model_with):
    model_with(lambda model: model.register_parameter("unused", nn.Parameter(torch.ones(3))))
    with pytest.raises(ConfigError) as caught:
        debug(tiny, steps=1, overfit=False)
    assert str(caught.value) == "Gradient check failed: unused receives no gradient."
    assert not run_folder(tiny).exists()


def test_a_detached_and_an_exploding_parameter_are_named(tiny, model_with):
    def spoil(model):
        model.tokens.heads[0].register_forward_hook(lambda head, inputs, output: output.detach() * 2)
        model.tokens.norms[2].weight.register_hook(lambda gradient: gradient * float("nan"))

    model_with(spoil)
    with pytest.raises(ConfigError) as caught:
        check_gradients(tiny)
    message = str(caught.value)
    assert "tokens.heads.0.weight receives no gradient" in message
    assert "tokens.norms.2.weight receives a gradient that is not finite" in message
    assert "tokens.heads.1.weight" not in message


def test_degrees_are_set_aside_on_one_rank(tiny, capsys):
    config = changed(tiny, model__moe=EXPERTS, parallel__expert_parallel=2)
    debug(config, steps=1, overfit=False)
    assert "parallel.expert_parallel 2 play no part" in capsys.readouterr().err
    assert records(debug_run(config))[-1]["experts/load_max"] >= 1


def test_options_that_do_not_go_together_are_refused_all_the_same(tiny):
    with pytest.raises(ParallelError, match=r"set parallel\.tensor_parallel to 1"):
        debug(changed(tiny, model__moe=EXPERTS, parallel__tensor_parallel=2), steps=1, overfit=False)
    assert not run_folder(tiny).exists()
