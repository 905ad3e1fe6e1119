import json
import os
from dataclasses import asdict, fields, replace
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onetrain.data.options import DataOptions, PathwayOptions, SourceOptions
from onetrain.data.stream_options import MixtureOptions
from onetrain.launcher.config import check, config_difference, load_config, run_folder, save_config
from onetrain.launcher.config_messages import NAMED, all_keys, dotted
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import EvaluationOptions, RunConfig, TrackingOptions
from onetrain.model.options import KSAOptions, ModelOptions, QueryFormerOptions
from onetrain.parallel.options import OptimizerOptions, ParallelOptions

SMALLEST = "name: small\ndata: {prepared: /prepared}\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_are_those_of_the_options(write):
    config = load_config(write(SMALLEST))
    expected = RunConfig("small", storage_path=f"{Path.cwd()}/runs", data=DataOptions(prepared="/prepared"))
    assert config == expected


def test_folders_of_the_stream_are_absolute_and_urls_stay(write):
    mixture = "{a: {parts: 1}, b: {parts: 2, prepared: p/b}, c: {parts: 3, prepared: s3://x/c}}"
    stream = load_config(write(SMALLEST + f"stream: {{cache: cache, mixture: {mixture}}}")).stream
    assert stream.cache == f"{Path.cwd()}/cache"
    assert [part.prepared for part in stream.mixture.values()] == [None, f"{Path.cwd()}/p/b", "s3://x/c"]


def test_sections_lists_and_numbers_arrive_with_their_types(write):
    config = load_config(
        write(
            SMALLEST
            + "model: {features: [sid, gap], d_ff: 7}\noptimizer: {learning_rate: 1e-3, eps: 1, betas: [0, .5]}"
        )
    )
    assert config.model.features == ("sid", "gap")
    assert config.model.d_ff == 7
    assert config.optimizer.learning_rate == 0.001
    assert config.optimizer.betas == (0.0, 0.5)
    assert type(config.optimizer.eps) is float


def test_overrides_win_over_the_file_and_the_last_over_the_first(write):
    path = write(SMALLEST + "train: {steps: 1, log_every: 7}")
    config = load_config(
        path, ["train.steps=2", "train.steps=3", "model.features=[item, sid]", "data.source.columns.user=uid"]
    )
    assert (config.train.steps, config.train.log_every) == (3, 7)
    assert config.model.features == ("item", "sid")
    assert config.data.source.columns == {"user": "uid"}


def test_an_override_of_an_aliased_section_changes_only_its_own(write):
    path = write(SMALLEST + "tracking: &t {project: a}\nparallel: {deepspeed: {copy: *t}}")
    config = load_config(path, ["tracking.project=b"])
    assert config.tracking.project == "b"
    assert config.parallel.deepspeed == {"copy": {"project": "a"}}


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "name.x=3", "train.steps=[1", ""])
def test_a_malformed_override_is_named(write, override):
    assert f"--set {override}" in problems_of(write(SMALLEST), [override])


def test_every_problem_is_told_at_once(write):
    message = problems_of(
        write(
            "name: 3\nmode: {}\nmodel: {d_model: '3', features: [sid, 4]}\ntokenizer: {codebook: [1]}\n"
            "train: {log_every: 2.0, deterministic: yes}\noptimizer: {betas: [1], warmup_steps: , eps: .nan}\n"
            "evaluation: []\ndata: {source: {behaviours: {1: click}}}"
        )
    )
    for line in (
        "name: given 3 (a whole number), expected text",
        "mode: unknown key; did you mean model?",
        'model.d_model: given "3" (text), expected a whole number',
        "model.features[1]: given 4 (a whole number), expected text",
        "tokenizer.codebook is [1]",
        "train.log_every: given 2.0 (a number), expected a whole number",
        'train.deterministic: given "yes" (text), expected true or false',
        "optimizer.betas[1]: is missing; expected a number",
        "optimizer.warmup_steps: given null, expected a whole number",
        "optimizer.eps: given nan, expected a finite number",
        "evaluation: given [] (a list), expected a section with keys among ks,",
        'data.source.behaviours: the key 1 is not text; write "1"',
    ):
        assert f"\n  {line}" in message
    assert "12 problems" in message


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("modle=3", "did you mean model?"),
        ("model.embedding_dim=3", "did you mean model.embed_dim or data.source.simulator.embedding_dim"),
        ("train.learning_rate=3", "did you mean optimizer.learning_rate?"),
        ("batch.pathways.liked.lenght=3", "did you mean batch.pathways.liked.length"),
        ("learning_rat=3", "did you mean optimizer.learning_rate?"),
        ("tracking.qqqq=3", "the keys here are wandb, project, entity, tags"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_one(write, override, suggestion):
    message = problems_of(write(SMALLEST), [override])
    assert override.partition("=")[0] + ": unknown key" in message
    assert suggestion in message


def test_full_attention_is_a_word(write):
    message = problems_of(write(SMALLEST), ["model.ksa.history.layers=[ksa, 16768]"])
    assert "model.ksa.history.layers[1]: given 16768 (a whole number), expected one of ksa, full" in message


@pytest.mark.parametrize("value", ["true", "1.0", "4", "'1'"])
def test_a_number_among_choices_is_strict(write, value):
    assert "expected one of 0, 1, 2, 3" in problems_of(write(SMALLEST), [f"parallel.zero_stage={value}"])


def test_a_missing_name_is_named(write):
    assert "name: is missing; expected text" in problems_of(write("data: {prepared: x}"))


def test_a_missing_file_an_empty_file_and_a_list_are_refused(write, tmp_path):
    assert "there is no such file" in problems_of(tmp_path / "absent.yaml")
    assert "is empty" in problems_of(write("# nothing\n"))
    assert "not a mapping" in problems_of(write("- a\n- b\n"))
    assert "cannot be read" in problems_of(tmp_path)


def test_bad_yaml_is_placed(write):
    assert "line 3, column" in problems_of(write("name: a\nmodel:\n  d_ff: [1, }\n"))


@pytest.mark.parametrize("text", ["name: a\nname: b", "a: {x: 1, x: 2}", "a:\n  b: 1\n  'b': 2"])
def test_a_key_given_twice_is_refused(write, text):
    message = problems_of(write(text))
    assert "is given twice, first in line" in message
    assert f"line {text.count(chr(10)) + 1}, column" in message


def test_merge_keys_may_be_overridden(write):
    text = "parallel:\n  deepspeed: {base: &base {x: 1, y: 2}, more: {<<: *base, y: 3}}\n"
    assert load_config(write(SMALLEST + text)).parallel.deepspeed["more"] == {"x": 1, "y": 3}


def test_variables_and_home_are_filled_in(write, monkeypatch):
    monkeypatch.setenv("STORE", "s3://bucket")
    monkeypatch.setenv("HOME", "/home/reader")
    path = write("name: a\nstorage_path: ~/runs\ndata: {prepared: '${STORE}/p$$'}\ntracking: {project: $~/x$1}")
    config = load_config(path)
    assert config.storage_path == "/home/reader/runs"
    assert config.data.prepared == "s3://bucket/p$"
    assert config.tracking.project == "~/x$1"


def test_an_unset_variable_is_named(write, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    message = problems_of(write(SMALLEST), ["tracking.project=${NOT_SET}"])
    assert "tracking.project: the environment variable 'NOT_SET' is not set" in message


def test_relative_paths_start_at_the_current_folder(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(write("name: a\ndata: {prepared: ../p, source: {events: 'logs/*.csv', items: s3://b/i}}"))
    assert os.path.realpath(config.data.prepared) == os.path.realpath(tmp_path / "p")
    assert config.data.source.events == f"{tmp_path}/elsewhere/logs/*.csv"
    assert config.data.source.items == "s3://b/i"
    assert run_folder(config) == tmp_path / "elsewhere" / "runs" / "a"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("name=a/b", "name"),
        ("name=..", "name"),
        ("storage_path=s3://bucket", "storage_path"),
        ("data.prepared=''", "data.prepared"),
        ("evaluation.best_metric=recall@7", "evaluation.best_metric"),
        ("evaluation.best_metric=auc@10", "evaluation.best_metric"),
        ("evaluation.best_metric=recall", "evaluation.best_metric"),
        ("evaluation.beam_size=19", "evaluation.beam_size"),
        ("evaluation.ks=[]", "evaluation.ks"),
        ("evaluation.ks=[10, 5]", "evaluation.ks"),
        ("evaluation.ks=[0, 5]", "evaluation.ks"),
        ("train.steps=0", "train.steps"),
        ("train.log_every=0", "train.log_every"),
        ("train.checkpoint_every=-1", "train.checkpoint_every"),
    ],
)
def test_a_value_that_does_not_fit_is_named(write, override, key):
    assert f"\n  {key}: " in problems_of(write(SMALLEST), [override])


def test_a_shared_context_needs_positions_that_every_target_shares(write):
    overrides = ["batch.share_context=user", "model.position=recency"]
    assert "batch.share_context" in problems_of(write(SMALLEST), overrides)
    for fine in overrides:
        assert load_config(write(SMALLEST), [fine])


def test_no_beam_size_means_every_sid(write):
    assert load_config(write(SMALLEST), ["evaluation.beam_size=null"]).evaluation.beam_size is None


def test_check_refuses_what_was_built_in_code():
    config = RunConfig("a", data=DataOptions(prepared="p"), evaluation=EvaluationOptions(ks=(1, 3)))
    with pytest.raises(ConfigError, match="best_metric"):
        check(config)


def test_difference_lists_the_changed_keys():
    first = RunConfig("a", parallel=ParallelOptions(deepspeed={"x": 1, "same": 2}))
    second = replace(first, seed=4, parallel=ParallelOptions(zero_stage=2, deepspeed={"same": 2}))
    assert config_difference(first, first) == []
    assert config_difference(first, second) == [
        ("parallel.deepspeed.x", 1, None),
        ("parallel.zero_stage", 0, 2),
        ("seed", 0, 4),
    ]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
not_negative = st.floats(0, allow_infinity=False)
below_one = st.floats(0, 1, exclude_max=True)
segment = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..")
)
path_text = segment.map(lambda part: f"/data/{part}")
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
configs = st.builds(
    RunConfig,
    name=st.from_regex(r"[a-z0-9_][a-z0-9_.=+-]{0,8}", fullmatch=True),
    storage_path=path_text,
    seed=st.integers(),
    data=st.builds(
        DataOptions,
        prepared=path_text,
        source=st.builds(
            SourceOptions,
            events=path_text,
            columns=st.dictionaries(text, text, max_size=3),
            extra=st.lists(text, max_size=3).map(tuple),
        ),
    ),
    model=st.builds(
        ModelOptions, d_ff=st.none() | st.integers(1), features=st.sampled_from([("sid",), ("item", "gap")])
    ),
    optimizer=st.builds(OptimizerOptions, learning_rate=not_negative, betas=st.tuples(below_one, below_one)),
    parallel=st.builds(ParallelOptions, deepspeed=st.dictionaries(text, json_value, max_size=3)),
    tracking=st.builds(
        TrackingOptions, project=text, entity=st.none() | text, tags=st.lists(text, max_size=3).map(tuple)
    ),
)


@pytest.mark.parametrize(
    "override",
    [
        "model.n_heads=0",
        "model.g_kv=0",
        "model.d_model=0",
        "model.embed_dim=0",
        "optimizer.learning_rate=-1.0",
        "optimizer.embedding_learning_rate=-0.5",
        "optimizer.betas=[2.0, 0.0]",
        "optimizer.warmup_steps=-5",
        "parallel.gradient_clipping=-1.0",
        "parallel.collective_timeout_s=0",
        "batch.behaviour_weights={view: 0.0}",
        "batch.min_context=51",
    ],
)
def test_numbers_out_of_range_are_refused_by_name(write, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config(write(SMALLEST), [override])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs)
def test_saved_configurations_load_back_equal(tmp_path, config):
    path = tmp_path / "saved" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


@given(number=not_negative)
def test_a_float_written_by_python_overrides_as_itself(tmp_path_factory, number):
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text(SMALLEST)
    assert load_config(path, [f"optimizer.eps={number!r}"]).optimizer.eps == number


def test_keys_are_those_of_the_dataclasses():
    keys = {dotted(key) for key in all_keys()}
    assert {field.name for field in fields(RunConfig)} <= keys
    assert {"data.source.simulator.users", "train.steps", "parallel.deepspeed"} <= keys


def test_the_documentation_has_every_key_with_its_default():
    documentation = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in documentation.splitlines() if line.startswith("| `")]
    documented = {key.strip("`"): default.strip("`") for _, key, _, default, *_ in rows if len(key) > 2}
    defaults = asdict(RunConfig("must be given"))
    expected = {}
    defaults["batch"]["pathways"] = {NAMED: asdict(PathwayOptions())}
    defaults["stream"]["mixture"] = {NAMED: asdict(MixtureOptions(1)) | {"parts": "required"}}
    defaults["model"]["query_formers"] = {NAMED: asdict(QueryFormerOptions())}
    defaults["model"]["ksa"] = {NAMED: asdict(KSAOptions())}
    for location in all_keys():
        value = reduce(lambda section, part: section[part], location, defaults)
        if not isinstance(value, dict) or not value:
            expected[dotted(location)] = (value or "''") if isinstance(value, str) else json.dumps(value)
    assert {key: documented.get(key) for key in expected} == expected
