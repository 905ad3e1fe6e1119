"""Validation while training: the same numbers on any number of ranks, and from `onetrain evaluate`."""

import pytest
from train_cases import changed, checkpoint, records, train_on

from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.train import train

KEPT_WHOLE = "stage3_param_persistence_threshold"  # parameters smaller than this are not partitioned


def numbers(record):
    return {name: value for name, value in record.items() if name not in ("step", "time", "attempt", "kind")}


def test_sharded_validation_equals_evaluating_the_checkpoint_alone(tiny, two_ranks):
    config = changed(
        tiny,
        train__steps=6,
        train__evaluate_every=3,
        parallel__zero_stage=3,
        parallel__deepspeed={"zero_optimization": {KEPT_WHOLE: 0}},
        batch__request_by="timestamp",
        evaluation__batch_size=50,  # 120 users on each rank: 50, 50 and 20
    )
    result = train_on(two_ranks, config)
    validations = {record["step"]: numbers(record) for record in records(config, "valid")}
    assert list(validations) == [3, 6]
    for step, validation in validations.items():
        table = evaluate(config, str(checkpoint(config, step)), "valid")
        alone = table.record["results"]["model"]["all"]
        assert alone.keys() == validation.keys()
        assert alone["requests"] == 240
        assert alone["hr@10"] > 0
        for name, value in alone.items():
            assert validation[name] == pytest.approx(value, rel=1e-5), (step, name)
    assert result["valid_loss"] == validations[6]["loss"]
    assert evaluate(config, "latest", "valid").record["checkpoint"] == str(checkpoint(config, 6))


def test_a_rank_without_requests_changes_nothing(tiny, two_ranks):
    config = changed(tiny, train__steps=1, evaluation__max_users=1)
    one, two = changed(config, name="one"), changed(config, name="two")
    frozen = {"optimizer__learning_rate": 0}  # both evaluate the initial weights
    train(changed(one, **frozen))
    train_on(two_ranks, changed(two, **frozen))
    (alone,), (shared,) = (records(run, "valid") for run in (one, two))
    assert alone["requests"] == shared["requests"] == 1
    assert numbers(shared) == pytest.approx(numbers(alone), rel=1e-5)
