"""Several processes give what one gives: here two, on the CPU, that a launcher starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, tiny_tokenizer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

from workbench import parallel
from workbench.__main__ import main
from workbench.errors import EditorError, ModelError
from workbench.files import read_tensors
from workbench.models import LanguageModel

TESTS = Path(__file__).parent
# With --cpu accelerate leaves it to MPI to start several; without a card these take the CPU too.
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
]
RUN = [
    *("--limit", "9", "--validation", "3", "--validate-every", "2", "--save-every", "1"),
    *("--health-after", "0", "--text-tokens", "8", "--steps", "4", "--lr", "1e-3"),
]
RUNS = {
    "shares of 1 and 2": ["--rank", "4", "--batch", "3", "--accumulate", "2"],
    "sets in chunks": [
        *("--rank", "4", "--batch", "8", "--at-once", "4", "--chunk", "2"),
        *("--crossed", "1", "--hardest", "1", "--gate", "0.1"),
    ],
    "a trained base": ["--editor", "enn", "--batch", "3"],
}
FIRST, RESUMED, LAST = RUNS
EDITS = ["evaluate", "--data", "facts", "--split", "dev", "--crossed", "1", "--limit"]


class Left(NamedTuple):
    """What one process and what two have left, and what the two said."""

    one: Path
    two: Path
    out: str
    err: str


def train(model: str, folder: Path, name: str, *more: str) -> list[str]:
    out = ["--out", str(folder / name)]
    return ["train", "--model", model, "--data", "facts", *out, *RUN, *RUNS[name], *more]


def commands(model: str, folder: Path, trained: Path) -> list[list[str]]:
    """Train, resume and evaluate."""
    first, last = (["--editors", str(trained / name)] for name in (FIRST, LAST))
    return [
        *(train(model, folder, name) for name in RUNS),
        train(model, folder, RESUMED, "--steps", "6", "--resume"),
        [*EDITS, "9", "--model", model, *last, "--json", str(folder / "alone.json")],
        [
            *(*EDITS, "6", "--model", model, *first, "--at-once", "5"),
            *("--json", str(folder / "five.json")),
        ],
    ]


@pytest.fixture(scope="module")
def left(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Everything in one launch, since that is what takes time."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for arguments in commands(tiny_model, one, one):
        assert main(arguments) == 0
    shutil.copytree(one / FIRST, two / "0")
    refused = [
        train(tiny_model, two, RESUMED, "--batch", "4", "--out", str(two / "small")),
        train(tiny_model, two, FIRST, "--resume", "--out", str(two / "{rank}")),
    ]
    listed = two / "commands.json"
    listed.write_text(json.dumps([*commands(tiny_model, two, one), *refused]))
    done = subprocess.run(
        [*LAUNCH, str(TESTS / "launched.py"), str(listed)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Left(one, two, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_in_two_processes_is_training_in_one(left: Left, name: str):
    for file in ("editor.safetensors", "checkpoint.safetensors"):
        found, about = read_tensors(left.two / name / file, EditorError)
        wanted, _ = read_tensors(left.one / name / file, EditorError)
        assert about
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    lines = [
        [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        for folder in (left.one, left.two)
    ]
    for mine, theirs in zip(*lines, strict=True):  # so each line is written once
        assert mine.pop("validation", {}) == pytest.approx(
            theirs.pop("validation", {}), rel=1e-4, abs=1e-6
        )
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_run_is_resumed_in_two_processes(left: Left):
    about = json.loads((left.two / RESUMED / "editor.json").read_text())
    assert about["card"]["steps"] == 6
    assert left.out.count("4 steps; ") == len(RUNS)  # said once, not by each
    assert left.out.count("6 steps; ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", ["alone.json", "five.json"])
def test_evaluation_in_two_processes_is_that_in_one(left: Left, file: str):
    def figures(folder: Path) -> dict[str, Any]:
        found = json.loads((folder / file).read_text())
        for scores in found["editors"].values():
            for name in ("seconds", "seconds_per_edit", "device"):
                del scores[name]
            del scores["confidence_95"]["seconds_per_edit"]
        return found

    assert figures(left.two) == figures(left.one)


@pytest.mark.slow
def test_what_processes_cannot_share_is_refused_by_all(left: Left):
    assert left.out.count("status 2") == 4
    assert left.err.count("A batch of 4 is too small for 2 processes") == 2
    assert not (left.two / "small").exists()
    assert left.err.count("The processes do not find the same: the step of the run") == 2


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fsdp_one(model: nn.Module, mesh: DeviceMesh) -> None:
    block = model.get_submodule("model.layers.0")
    with pytest.warns(UserWarning, match="NO_SHARD"):  # of one process
        model.get_submodule("model.layers")[0] = FullyShardedDataParallel(  # type: ignore[operator]
            block, device_mesh=mesh, device_id=torch.device("cpu")
        )


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]))  # type: ignore[arg-type]


def deepspeed(model: nn.Module, mesh: DeviceMesh) -> None:
    # DeepSpeed is not at hand here: this is the mark that it leaves.
    model.get_parameter("model.norm.weight").ds_id = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("shard", "found"),
    [
        (lambda model, mesh: fully_shard(model, mesh=mesh), "as DTensors, by FSDP"),
        (fsdp_one, r"by FSDP \(FullyShardedDataParallel\)"),
        (tensor_parallel, r"as DTensors.*\(model.layers.1.mlp.up_proj.weight\)"),
        (deepspeed, r"by DeepSpeed's ZeRO stage 3 \(model.norm.weight\)"),
    ],
)
def test_a_sharded_model_is_refused_with_what_to_do(
    mesh: DeviceMesh, shard: Callable[[nn.Module, DeviceMesh], object], found: str
):
    model = FAMILIES["llama"]()
    LanguageModel.wrap(model, tiny_tokenizer())
    shard(model.requires_grad_(True), mesh)
    with pytest.raises(ModelError, match=f"is sharded {found}.*device_map='auto'"):
        LanguageModel.wrap(model, tiny_tokenizer())


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("sets", [0, 1, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_the_whole_in_order(
    monkeypatch: pytest.MonkeyPatch, count: int, sets: int, together: int
):
    items, parts = list(range(sets * together)), []
    monkeypatch.setattr(parallel, "count", lambda: count)
    for place in range(count):
        monkeypatch.setattr(parallel, "place", lambda place=place: place)
        parts.append(parallel.share(items, together))
    assert [item for part in parts for item in part] == items
    sizes = {len(part) for part in parts}
    assert all(size % together == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= together


def test_one_card_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch):
    assert parallel.join("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match=r"cannot share the device cuda:1: leave --device out"):
        parallel.join("cuda:1")
