import errno
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from onetrain.cluster.errors import ClusterError
from onetrain.data.errors import DataError
from onetrain.launcher.cli import app

VERBS = ["plan", "prepare", "append", "tokenize", "train", "debug", "evaluate", "doctor", "status", "report"]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(f"name: job\nstorage_path: {tmp_path}/runs\ndata: {{prepared: {tmp_path}/prepared}}\n")
    return str(path)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a function in the place of one that a verb imports when it runs."""

    def put(module, name, function):
        fake = ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


def onetrain(*arguments):
    return CliRunner().invoke(app, list(arguments))


def failing(error):
    def run(*arguments, **options):
        raise error

    return run


def in_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "onetrain.launcher.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_help_names_every_verb_and_each_verb_shows_an_example():
    out = onetrain("--help").output
    for verb in VERBS:
        assert f" {verb} " in out
        help_text = onetrain(verb, "--help").output
        assert f"Example: onetrain {verb} " in help_text
        assert "--set" in help_text


def test_version():
    assert onetrain("--version").output.startswith("onetrain 0.")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from onetrain.launcher import cli; "
        "print([m for m in ('torch', 'ray', 'deepspeed', 'wandb', 'pyarrow', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("nam: a", [], "nam: unknown key; did you mean name?"),
        ("name: a\nmodel: {d_modle: 4}", [], "did you mean model.d_model?"),
        ("name: a\ntrain: {steps: '3'}", [], 'train.steps: given "3" (text), expected a whole number'),
        ("name: a", ["--set", "train.stesp=1"], "did you mean train.steps?"),
        ("name: [", [], "line 1"),
        (None, [], "there is no such file"),
    ],
)
def test_a_bad_configuration_ends_with_2_and_no_traceback(tmp_path, text, arguments, message):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    for verb in ("prepare", "train", "doctor"):
        done = onetrain(verb, str(path), *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ([] if text is None else ["bad.yaml"])


def test_the_exit_code_reaches_the_shell(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: a\nmodle: {}\n")
    done = in_process("train", str(path))
    assert done.returncode == 2
    assert "modle: unknown key; did you mean model?" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_and_a_missing_argument_end_with_2(job):
    assert onetrain("train", job, "--wokers", "2").exit_code == 2
    assert onetrain("train").exit_code == 2
    assert onetrain("evaluate", job, "--split", "train").exit_code == 2


@pytest.mark.parametrize(("error", "code"), [(DataError("the log is empty"), 3), (ClusterError("no CPUs"), 5)])
def test_an_error_of_a_room_is_one_message_and_its_exit_code(job, stand_in, error, code):
    stand_in("onetrain.data.prepare", "prepare", failing(error))
    done = onetrain("prepare", job)
    assert done.exit_code == code
    assert f"error: {error}" in done.stderr


def test_the_error_of_a_ray_worker_is_that_of_its_cause(job, stand_in):
    wrapped = RuntimeError("ray's own text")
    wrapped.cause = DataError("shard-00003.arrow is truncated")
    stand_in("onetrain.launcher.supervised", "run_supervised", failing(wrapped))
    done = onetrain("train", job)
    assert done.exit_code == 3
    assert "error: shard-00003.arrow is truncated" in done.stderr


def test_a_full_disk_names_the_file(job, stand_in):
    stand_in("onetrain.data.prepare", "prepare", failing(OSError(errno.ENOSPC, "No space left", "/store/shard")))
    done = onetrain("prepare", job)
    assert done.exit_code == 6
    assert "no disk space left for /store/shard" in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EACCES, "denied")])
def test_a_bug_keeps_its_traceback(job, stand_in, error):
    stand_in("onetrain.data.prepare", "prepare", failing(error))
    done = onetrain("prepare", job)
    assert done.exception is error


def test_ctrl_c_ends_with_130(job, stand_in):
    stand_in("onetrain.data.prepare", "prepare", failing(KeyboardInterrupt()))
    done = onetrain("prepare", job)
    assert done.exit_code == 130
    assert "stopped by Ctrl-C" in done.stderr


def test_ctrl_c_of_a_real_process_ends_with_130(job):
    code = (
        "import sys, time, types; from onetrain.launcher.cli import main\n"
        "fake = types.ModuleType('onetrain.data.prepare'); sys.modules[fake.__name__] = fake\n"
        "def prepare(options, report):\n  print('ready', flush=True); time.sleep(60)\n"
        "fake.prepare = prepare; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "prepare", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in stderr
    assert "Traceback" not in stderr


def test_train_runs_one_function_under_supervision(job, stand_in):
    calls = []
    stand_in("onetrain.launcher.supervised", "run_supervised", lambda config: calls.append(config) or {"loss": 1.25})
    arguments = ["--workers", "3", "--address", "node:6379", "--set", "train.threads_per_worker=2"]
    done = onetrain("train", job, *arguments, "--set", "cluster.workers=7", "--set", "parallel.global_batch_size=6")
    assert done.exit_code == 0, done.output
    (config,) = calls
    assert (config.cluster.workers, config.cluster.address, config.train.threads_per_worker) == (3, "node:6379", 2)
    assert "1.2500" in done.stdout
    assert f"{config.storage_path}/job" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_under_torchrun_train_is_one_rank(job, stand_in, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    stand_in("onetrain.launcher.train", "train", lambda config: seen.append(config.name) or {"loss": 1.25})
    stand_in("onetrain.launcher.supervised", "run_supervised", failing(AssertionError("Ray was started")))
    done = onetrain("train", job)
    assert done.exit_code == 0, done.output
    assert seen == ["job"]
    assert ("1.2500" in done.stdout) == (rank == "0")
    assert onetrain("train", job, "--workers", "2").exit_code == 2


IMPOSSIBLE = [
    (["parallel.tensor_parallel=2"], "parallel.tensor_parallel 2 needs a multiple of 2 ranks, and there are 3"),
    (["parallel.expert_parallel=3"], "parallel.expert_parallel 3 needs experts"),
    (["parallel.precision=bf16"], "set parallel.zero_stage to 1"),
    (["parallel.global_batch_size=2"], "global_batch_size 2 is too small for 3 ranks"),
]


@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_an_impossible_mesh_is_refused_before_anything_starts(job, stand_in, monkeypatch, changes, message, torchrun):
    if torchrun:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "3")
    stand_in("onetrain.launcher.train", "train", failing(AssertionError("training was started")))
    stand_in("onetrain.launcher.supervised", "run_supervised", failing(AssertionError("Ray was started")))
    overrides = ["parallel.global_batch_size=12", *changes, *([] if torchrun else ["cluster.workers=3"])]
    done = onetrain("train", job, *(word for change in overrides for word in ("--set", change)))
    assert done.exit_code == 4, done.output
    assert message in done.stderr


def test_the_mesh_is_drawn_where_there_are_several_ranks(job, stand_in, monkeypatch):
    stand_in("onetrain.launcher.train", "train", lambda config: {"loss": 1.25})
    stand_in("onetrain.launcher.supervised", "run_supervised", lambda config: {"loss": 1.25})
    mesh = ["--set", "model.moe.experts=4", "--set", "parallel.expert_parallel=2"]
    done = onetrain("train", job, "--workers", "4", *mesh)
    assert "mesh of 4 ranks: data 4; experts over 2" in done.stderr
    assert "mesh of" not in onetrain("train", job, "--workers", "1").stderr
    sizes = ["--set", "cluster.workers=4", "--set", "plan.sizes={behaviour: 3}"]
    done = onetrain("plan", job, *mesh, *sizes)
    assert "rank         |   0     1 |   2     3 |" in done.stdout, done.output
    for rank, drawn in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert ("mesh of 2 ranks" in onetrain("train", job).stderr) == drawn


def test_metrics_of_single_layers_stay_in_the_log(job, stand_in):
    result = {"loss": 1.25, "experts/load_max": 1.5, "experts/layer_01/load_max": 1.625}
    stand_in("onetrain.launcher.supervised", "run_supervised", lambda config: result)
    done = onetrain("train", job, "--workers", "1")
    assert "1.5000" in done.stdout
    assert "1.6250" not in done.stdout


def test_debug_says_how_many_steps(job, stand_in):
    calls = []
    stand_in("onetrain.launcher.debug", "debug", lambda config, steps, overfit: calls.append((steps, overfit)))
    for arguments in ([], ["--steps", "7"], ["--overfit", "9"]):
        assert onetrain("debug", job, *arguments).exit_code == 0
    assert calls == [(20, False), (7, False), (9, True)]
    assert onetrain("debug", job, "--steps", "7", "--overfit", "9").exit_code == 2
    assert onetrain("debug", job, "--steps", "0").exit_code == 2


def test_evaluate_prints_and_saves_its_table(job, stand_in, tmp_path):
    calls, saved = [], []

    def save(config):
        saved.append(config)
        return tmp_path / "evaluation_test.json"

    def evaluate(config, checkpoint, split, progress):
        progress("users", 2, 2)
        calls.append((config.name, checkpoint, split))
        rows = [["popularity", 0.0123], ["model", 0.0624]]
        return SimpleNamespace(
            title="test", columns=["method", "recall@10"], rows=rows, notes=["full ranking"], save=save
        )

    stand_in("onetrain.launcher.evaluate", "evaluate", evaluate)
    done = onetrain("evaluate", job)
    assert done.exit_code == 0, done.output
    assert onetrain("evaluate", job, "--checkpoint", "/c/step_1", "--split", "valid").exit_code == 0
    assert calls == [("job", "best", "test"), ("job", "/c/step_1", "valid")]
    assert [config.name for config in saved] == ["job", "job"]
    assert "evaluation_test.json" in done.stderr
    for part in ("popularity", "0.0123", "0.0624", "full ranking"):
        assert part in done.stdout


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_when_a_check_does(job, stand_in, state, code):
    configs = []

    def checks(config, quick):
        configs.append((config and config.name, quick))
        return [SimpleNamespace(name="disk", state=state, detail="2 GB free", fix="make room")]

    stand_in("onetrain.launcher.doctor", "checks", checks)
    assert onetrain("doctor").exit_code == code
    done = onetrain("doctor", job, "--quick")
    assert done.exit_code == code
    assert "2 GB free" in done.stdout
    assert "disk: make room" in done.stdout
    assert configs == [(None, False), ("job", True)]
    assert onetrain("doctor", "--set", "seed=1").exit_code == 2


def test_prepare_and_tokenize_print_their_reports(job, tmp_path):
    simulator = "simulator: {users: 40, items: 60, events_per_user: 8, themes: 10}"
    small = ["--set", f"data.source={{reader: simulator, events: {tmp_path}/logs, {simulator}}}"]
    small += ["--set", "tokenizer={codebook: [4, 4, 4], iterations: 3}"]
    done = onetrain("prepare", job, *small)
    assert done.exit_code == 0, done.output
    for part in ("users", "events", "duplicates dropped", "fingerprint"):
        assert part in done.stdout
    done = onetrain("tokenize", job, *small)
    assert done.exit_code == 0, done.output
    for part in ("codes, level 3", "SID collision rate", "utilisation, level 1"):
        assert part in done.stdout
    assert (tmp_path / "prepared" / "sids").is_dir()


def test_append_prints_its_report_and_the_same_log_again_is_nothing_new(job, tmp_path):
    (tmp_path / "monday.csv").write_text("user,item,timestamp\n1,a,10\n1,b,20\n2,b,30\n")
    (tmp_path / "tuesday.csv").write_text("user,item,timestamp\n1,a,40\n3,c,50\n2,b,30\n")
    monday = ["--set", f"data.source={{reader: columns, events: {tmp_path}/monday.csv}}"]
    assert onetrain("prepare", job, *monday).exit_code == 0
    for found in ("new events 1", "No version was made"):
        done = onetrain("append", job, *monday, "--events", str(tmp_path / "tuesday.csv"))
        assert done.exit_code == 0, done.output
        words = " ".join(done.output.replace("│", " ").split())
        assert found.lower() in words.lower()
        assert "unknown items 1" in words
    assert [path.name for path in (tmp_path / "prepared" / "versions").iterdir()] == ["00001"]
