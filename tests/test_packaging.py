"""What a stranger installs: the wheel holds every file it needs, its command runs beside folders named like ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from deploy.cli import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PRODUCT = ("hashring", "ps", "dense_head", "router", "deploy", "benchmarks")
MADE_BY_RUNNING = ("__pycache__", "*.pyc", "*.nbi", "*.nbc", "*.egg-info", ".*_cache")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The finished command; its output is the message where it fails."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as a stranger has it: a build leaves no traces in ours, nor finds any."""
    copy = tmp_path_factory.mktemp("source")
    for folder in (*PRODUCT, "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*MADE_BY_RUNNING))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source, cwd=folder)
    (found,) = folder.glob("embring-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment that has the wheel, and of everything else what this one has.

    The other packages come by a .pth file: Python does not follow the .pth files of a folder that is added so, and a
    development install of embring in this environment is therefore not seen.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", binaries / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (home / "lib" / version / "site-packages" / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """An otherwise empty folder with packages named like ours, which fail when they are imported."""
    for name in PRODUCT:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a decoy was imported')\n")
    return tmp_path


def test_the_wheel_holds_every_file_of_the_product(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {f.relative_to(source).as_posix() for p in PRODUCT for f in (source / p).rglob("*") if f.is_file()}
    assert {"ps/py.typed", "hashring/py.typed", "deploy/ray-cluster.yaml", "ps/server.py"} <= files
    missing = sorted(files - names)
    assert not missing, f"the wheel lacks {', '.join(missing)}; add their patterns to package-data in pyproject.toml"


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} <= set(PRODUCT)
    licences = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_command_runs_from_a_folder_with_decoys(installed: Path, decoys: Path) -> None:
    said = run(installed / "embring", "--help", cwd=decoys, COLUMNS="120").stdout
    for command in COMMANDS:
        assert command in said


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command: str, installed: Path, decoys: Path) -> None:
    said = run(installed / "embring", command, "--help", cwd=decoys, COLUMNS="120").stdout
    assert f"Usage: embring {command}" in said


def test_the_packages_come_from_the_wheel(installed: Path, decoys: Path) -> None:
    script = "import hashring, ps, dense_head, router, deploy.cli\n" + (
        "for m in (hashring, ps, dense_head, router, deploy.cli): print(m.__file__)"
    )
    files = run(installed / "python", "-P", "-c", script, cwd=decoys).stdout.split()
    assert len(files) == 5
    for file in files:
        assert Path(file).is_relative_to(installed.parent), f"{file} is not what the wheel installed"


def test_the_decoys_would_be_noticed(installed: Path, decoys: Path) -> None:
    """Without -P the current folder comes first: the failure that the command must not have."""
    done = subprocess.run([installed / "python", "-c", "import router"], cwd=decoys, capture_output=True, timeout=60)
    assert b"a decoy was imported" in done.stderr
