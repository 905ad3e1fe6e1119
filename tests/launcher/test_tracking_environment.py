import json
import subprocess
from importlib import metadata

from onetrain.launcher.environment import environment, git_state, package_version


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_environment_is_json_and_names_the_versions():
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["cpus"] >= 1
    assert found["device"]["type"] in ("cpu", "cuda")


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("no-such-distribution") is None


def test_git_state_knows_a_changed_file(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_a_folder_inside_another_project_has_no_git_state(tmp_path):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "first", "--allow-empty")
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None
