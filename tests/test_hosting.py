"""The app elsewhere: its container file, and the folder that a hosted Gradio Space is made of."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "apps" / "space"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))
# Serves the Space's app for one edit, and lists each place outside its folder that was written to.
VISIT = """
import os, runpy, sys
(folder,) = sys.argv[1:]
outside = set()
def watch(event, arguments):
    writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writing or event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.truncate"):
        path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        place = path if isinstance(path, int) else os.path.realpath(os.fsdecode(path))
        if not isinstance(place, int) and not place.startswith((folder + os.sep, "/dev/")):
            outside.add(place)
sys.addaudithook(watch)
space = runpy.run_path(os.path.join(folder, "app.py"))
app = space["interface"]()
from apps.editor_app import launch
from gradio_client import Client
_, url, _ = launch(app, prevent_thread_lock=True, quiet=True)
client = Client(url, verbose=False)
made = client.predict("The capital of France is", "Lyon", api_name="/edit")
print("\\n" + made["rows"][0]["edited_text"].split()[0].strip("."))
tabs = {part["props"].get("id") for part in app.config["components"] if part["type"] == "tabitem"}
print(sorted(tabs & {"edit", "model", "train"}), sorted(outside))
os._exit(0)
"""


def front_matter() -> dict[str, str]:
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}


def test_the_space_asks_for_what_is_pinned():
    about = front_matter()
    assert about["sdk"] == "gradio"
    assert f"gradio=={about['sdk_version']}" == locked()["gradio"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert about["python_version"] == project["tool"]["pyright"]["pythonVersion"]
    assert (SPACE / about["app_file"]).is_file()


def test_the_space_installs_the_pinned_requirements_of_the_app():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    names = {canonicalize_name(Requirement(line).name) for line in wanted} - {"gradio"}
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line[0] != "#"] == [locked()[name] for name in sorted(names)]


@pytest.mark.slow
def test_the_space_serves_the_locked_app_and_writes_in_its_own_folder(
    tmp_path: Path, free_port: int
):
    folder, elsewhere = (tmp_path / "space").resolve(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("data"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GRADIO_SERVER_PORT": str(free_port),
        "HOME": str(elsewhere),
    }
    command = [sys.executable, "-c", VISIT, str(folder)]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["Lyon", "['edit'] []"]
    assert not list(elsewhere.rglob("*"))
    assert list((folder / "data" / "workbench" / "models").iterdir())  # it was unpacked there


def test_a_linter_finds_nothing_in_the_container_file():
    assert HADOLINT is not None  # of the extra `dev`
    command = [HADOLINT, "--no-color", "--format", "json", "Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == [], done.stderr


def test_the_container_is_sent_what_it_copies_and_no_more():
    copied = {
        name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for name in line.split()
    }
    assert all((ROOT / name).exists() for name in copied)
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


def test_the_container_serves_a_locked_app_as_an_ordinary_user():
    (command,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    assert (json.loads(command)[1], json.loads(command)[-1]) == ("apps/editor_app.py", "--locked")
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.M) == ["1000"]
    source = (ROOT / "apps" / "editor_app.py").read_text(encoding="utf-8")
    (port,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)
    assert f'"--port", type=int, default={port}' in source
