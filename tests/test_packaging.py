"""The package as others get it: what the wheel holds, that no file of a user shadows ours, what the files name."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"launcher", "model", "parallel", "data", "cluster"}


def test_the_wheel_holds_the_five_rooms_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, source], check=True, capture_output=True, text=True, timeout=300)
    (wheel,) = tmp_path.glob("onetrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = {
        f"onetrain/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if all((folder / "__init__.py").exists() for folder in path.relative_to(ROOT).parents if folder.name)
    }
    assert {name.split("/")[1] for name in names} == ROOMS
    assert names == expected


def test_a_users_own_modules_and_ours_keep_apart(tmp_path):
    (tmp_path / "model.py").write_text("MINE = 'model'\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("MINE = 'data'\n")
    (tmp_path / "job.py").write_text(
        "import data, model\n"
        "import onetrain.data.options, onetrain.model.options\n"
        "from onetrain.cluster.options import ClusterOptions\n"
        "from onetrain.cluster.worker_group import run_on_workers\n"
        "def found():\n"
        "    import data, model\n"
        "    import onetrain.data.options, onetrain.model.options\n"
        "    return data.MINE, model.MINE, onetrain.data.options.__file__, onetrain.model.options.__file__\n"
        "print(*found(), sep='\\n')\n"
        "print(*run_on_workers(found, (), ClusterOptions(workers=1), 1)[0], sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    here, on_the_worker = lines[:4], lines[4:]
    assert here == on_the_worker
    assert here[:2] == ["data", "model"]
    assert [Path(path).name for path in here[2:]] == ["options.py", "options.py"]
    assert not any(Path(path).is_relative_to(tmp_path) for path in here[2:])


def test_every_direct_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    wanted = set()
    for requirement in metadata.requires("onetrain") or []:
        if "extra ==" not in requirement or re.search(r"extra == .dev", requirement):
            wanted.add(re.match(r"[\w.-]+", requirement)[0].lower())
    assert len(wanted) > 20
    assert wanted == pinned


def test_no_file_names_a_package_registry():
    hosts = ["pypi" + ".org", "python" + "hosted.org", "npmjs" + ".", "anaconda" + ".org", "download.py" + "torch.org"]
    options = ["--index" + "-url", "--find" + "-links"]
    try:
        listing = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    texts = {name: (ROOT / name).read_text(errors="ignore") for name in files if name and (ROOT / name).is_file()}
    assert "setup.py" in texts
    assert [(name, word) for name, text in texts.items() for word in hosts + options if word in text] == []
