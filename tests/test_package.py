"""What is built: the sdist and the wheel hold what they need, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}"
ASSETS = ("assets/editors", "assets/models")
# What a package holds beside code, each read by a module: sheets of style, tables, texts.
DATA = {".css", ".toml", ".txt"}
# Where nothing is installed anew: no network, no environment of its own.
TRY = """
from pathlib import Path
import workbench
from workbench.corpus import facts
from workbench.editors import SHIPPED, shipped_editor
from workbench.shipped import SMALL_MODELS, assets_folder, small_model
from workbench.tables import CSS
print(Path(workbench.__file__).parent, len(facts()) > 0, CSS.is_file())
print(all((shipped_editor(name) / "editor.safetensors").is_file() for name in SHIPPED))
print(all((small_model(name) / "config.json").is_file() for name in SMALL_MODELS))
"""


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.iterdir())


def files(*folders: str) -> set[str]:
    """Files of the checkout below folders, but for what Python compiles."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder / "built")) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of the source distribution alone, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", sdist, folder / "built")) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def held(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_holds_the_sources_and_what_installs_them(sdist: Path):
    whole = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"}
    pins = {"requirements.lock", "requirements-models.txt"}
    made = {"PKG-INFO", ".gitignore"}
    sources = files("apps", "workbench", *ASSETS) - files("apps/space")
    assert held(sdist) == sources | whole | pins | made


def test_the_wheel_holds_the_package_its_assets_and_nothing_else(wheel: Path):
    about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    about |= {f"{NAME}.dist-info/{name}" for name in ("entry_points.txt", "licenses/LICENSE")}
    assets = {f"workbench/{name}" for name in files(*ASSETS)}
    assert held(wheel) == files("workbench") | assets | about


def test_the_package_holds_code_and_data_of_known_kinds():
    assert {Path(name).suffix for name in files("workbench")} == {".py", ".pyi", *DATA}


def test_the_assets_are_unpickled_by_nobody():
    assert {Path(name).suffix for name in files(*ASSETS)} == {".json", ".safetensors"}


def test_metadata_are_those_of_the_project(wheel: Path):
    built = Distribution.at(wheel / f"{NAME}.dist-info")
    about = built.metadata
    assert (about["Name"], about["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert about["License-Expression"] == PROJECT["license"]
    extras = PROJECT["optional-dependencies"]
    assert set(about.get_all("Provides-Extra") or ()) == set(extras)
    wanted = map(Requirement, built.requires or ())
    core = {str(requirement) for requirement in wanted if requirement.marker is None}
    assert core == {str(Requirement(line)) for line in PROJECT["dependencies"]}


def test_the_console_script_is_the_command_line(wheel: Path):
    scripts = Distribution.at(wheel / f"{NAME}.dist-info").entry_points
    assert {script.name: script.value for script in scripts} == PROJECT["scripts"]
    (script,) = scripts
    from workbench.__main__ import main

    assert script.load() is main


def test_what_the_wheel_holds_runs_from_where_it_lies(wheel: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(wheel), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", TRY]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(wheel / "workbench"), *["True"] * 4]
