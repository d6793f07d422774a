"""Laws of the repository: its layers, what it must not do, and files that must agree."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "workbench"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "apps").rglob("*.py")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Lowest first. A module imports from its own row and the rows above it, never from those below;
# a package stands where its name stands.
LAYERS = (
    ("errors",),
    ("cancel", "checks", "copies", "shortage", "files", "products", "recompute", "parallel"),
    ("data", "claims", "hub", "readers", "corpus", "sharing", "cards"),
    ("gguf", "shipped", "subjects"),
    ("layers", "models", "memory", "encoding", "masks", "scope"),
    ("updates", "adapters", "stacking"),
    ("crossing", "disk", "divergence", "metrics", "overlay", "factors", "views"),
    ("editors", "sentences", "rewrites"),
    ("training", "probes", "results"),
    ("neighborhood", "report"),
    (
        *("aggregate", "compare", "continuations", "edit", "evaluate"),
        *("history", "probing", "session", "sessionfile"),
    ),
    ("style",),
    ("plots", "tables", "reach"),
    ("widgets",),
    ("commands", "__main__", "__init__"),
    ("recipes",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
HEAVY = (
    *("accelerate", "anywidget", "bitsandbytes", "datasets", "gradio", "ipywidgets", "lm_eval"),
    *("networkx", "peft", "plotly", "tensorboard", "transformers"),
)
# The extras for users; the others serve documentation, figures as files, and development.
USERS = ("app", "datasets", "evaluation", "notebooks", "peft", "quant", "tensorboard")
HELPERS = ("base", "networks", "proposals", "scoping", "statistics")
UNPICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def parsed(path: Path) -> ast.Module:
    return ast.parse(read(path), str(path))


def imported(path: Path, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names of what the tree imports; `from a import b` gives a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def own_imports(path: Path, tree: ast.AST) -> set[str]:
    """Modules of this package that the tree imports; a plain `workbench` is its __init__."""
    found = set()
    for name in imported(path, tree):
        if name.split(".")[0] == "workbench":
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            found.add(name if name in MODULES else "workbench.__init__")
    return found


def layer(module: str) -> str:
    return module.split(".")[1]


def places(path: Path, nodes: list[ast.AST]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}" for node in nodes]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_has_at_most_400_lines(path: Path):
    assert len(read(path).splitlines()) <= 400


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} == set(RANK)  # LAYERS above lists them


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str):
    path = MODULES[name]
    higher = {
        other for other in own_imports(path, parsed(path)) if RANK[layer(other)] > RANK[layer(name)]
    }
    assert not higher


def test_module_level_imports_have_no_cycle():
    graph = {}
    for name, path in MODULES.items():
        top = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[name] = set().union(*(own_imports(path, node) for node in top)) - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


def test_editors_do_not_import_one_another():
    editors = {name for name in MODULES if name.startswith("workbench.editors.")}
    common = {f"workbench.editors.{name}" for name in HELPERS}
    for name in editors - common:
        path = MODULES[name]
        assert own_imports(path, parsed(path)) & editors <= common, name


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [(("-c", "import workbench"), set()), (("-m", "workbench", "train", "--help"), {"torch"})],
    ids=("import", "help"),
)
def test_nothing_heavy_is_loaded_before_a_model_is_opened(
    arguments: tuple[str, ...], needed: set[str]
):
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "workbench" in loaded
    assert loaded & {"torch", *HEAVY} == needed


def test_ruff_bans_the_same_heavy_modules():
    rules = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]
    assert rules["banned-module-level-imports"] == list(HEAVY)


def test_hooks_are_registered_in_factors_and_overlay_only():
    registration = re.compile(r"register_\w*hook\w*")
    found = []
    for path in set(SOURCES) - {PACKAGE / "factors.py", PACKAGE / "overlay.py"}:
        found += places(
            path,
            [
                node
                for node in ast.walk(parsed(path))
                if isinstance(node, ast.Attribute) and registration.fullmatch(node.attr)
            ],
        )
    assert not found


def unsafe(node: ast.AST) -> bool:
    """Whether a node pickles, unpickles, or lets a library do so or run a repository's code."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in ("torch.load", "torch.save") or node.attr == "read_pickle"
    if isinstance(node, ast.keyword):
        refused = isinstance(node.value, ast.Constant) and node.value.value is False
        return node.arg in ("trust_remote_code", "allow_pickle") and not refused
    return False


def test_nothing_is_unpickled_and_no_remote_code_runs():
    found = []
    for path in SOURCES:
        tree = parsed(path)
        found += places(path, [node for node in ast.walk(tree) if unsafe(node)])
        found += [
            f"{path.relative_to(ROOT)}: {name}"
            for name in imported(path, tree)
            if name.split(".")[0] in UNPICKLING or name in ("torch.load", "torch.save")
        ]
    assert not found


def requirements(*extras: str) -> list[str]:
    """Written requirements of the core and the named extras, each once, in order."""
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    written = {line for group in groups for line in group}
    return sorted(line for line in written if Requirement(line).name != project["name"])


def pins(name: str) -> dict[str, str]:
    """Package name to pinned version, of a file that holds nothing but pins and comments."""
    lines = read(ROOT / name).splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pairs}


def test_the_lock_pins_every_requirement_within_its_range():
    locked = pins("requirements.lock")
    for line in requirements(*PYPROJECT["project"]["optional-dependencies"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line
    for requirement in map(Requirement, PYPROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_the_lock_pins_no_variant_of_a_build():
    versions = {**pins("requirements.lock"), **pins("requirements-models.txt")}
    assert [name for name, version in versions.items() if "+" in version] == []


def test_conda_environment_lists_the_users_requirements():
    environment = yaml.safe_load(read(ROOT / "environment.yml"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == requirements(*USERS)


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", read(ROOT / "Makefile"), re.MULTILINE)
    assert found, target
    return [line.strip().replace("$(PY)", ".venv/bin/python") for line in found[1].splitlines()]


def test_pre_commit_runs_the_linters_of_make_over_the_whole_tree():
    (repository,) = yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched: the versions are the lock's
    hooks = repository["hooks"]
    *lint, audited = recipe("lint")  # which may need a network
    assert [hook["entry"] for hook in hooks] == lint + recipe("types")
    assert audited.endswith(" audited")
    run = {(hook["language"], hook["pass_filenames"]) for hook in hooks}
    assert run == {("system", False)}
    # A filter would let some commits through unseen: a stub is no file of type python.
    assert {key for hook in hooks for key in hook} == {
        *("id", "name", "entry", "language", "pass_filenames")
    }


class Answer(BaseHTTPRequestHandler):
    """Of a service that is there."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def audited(folder: Path, address: str, status: int) -> subprocess.CompletedProcess[str]:
    """`make audited` with an audit that ends with that status."""
    program = folder / "bin" / "pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho it ran\nexit {status}\n")
    program.chmod(0o700)
    command = ["make", "audited", f"AUDIT={folder}", f"FLAWS={address}"]
    own = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    environment = {**own, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_audit_is_left_out_where_its_service_is_not_there_and_fails_for_flaws(tmp_path: Path):
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        fine, flawed = (audited(tmp_path / str(status), address, status) for status in (0, 1))
        server.shutdown()
        thread.join()
    assert (fine.returncode, "it ran" in fine.stdout) == (0, True), fine.stderr
    assert (flawed.returncode != 0, "it ran" in flawed.stdout) == (True, True)
    gone = audited(tmp_path / "gone", address, 1)
    assert (gone.returncode, "it ran" in gone.stdout) == (0, False), gone.stderr
    (said,) = gone.stdout.splitlines()
    assert re.match(rf"The dependencies were not audited: {address} .*refused", said)


def test_one_version_everywhere():
    initial = read(PACKAGE / "__init__.py")
    changes = read(ROOT / "CHANGELOG.md")
    of_package = re.findall(r'^__version__ = "(.+)"$', initial, re.MULTILINE)
    newest = re.findall(r"^## \[(\d.*?)\]", changes, re.MULTILINE)[:1]
    assert of_package == newest == [PYPROJECT["project"]["version"]]


def test_notebooks_are_committed_executed_and_without_errors():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(read(path))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"])]
        assert all(cell["execution_count"] for cell in code), path.name
        outputs = {output["output_type"] for cell in code for output in cell["outputs"]}
        assert "error" not in outputs, path.name
