"""Files: complete or not there, and readable or an error that says why."""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import DataError, EditorError, FileError
from workbench.files import (
    flat_optimizer,
    read_tensors,
    restore_optimizer,
    write_bytes,
    write_tensors,
    write_text,
)

torch.set_num_threads(1)
OLD, NEW = b"old content", b"new content, longer than the old"


def fail_to_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="no file size limit; runs on Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, limits[1]))
    try:
        write_bytes(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_to_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    write_bytes(path, NEW)


def interrupt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    write_bytes(path, NEW)


def fail_to_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(path / "below a file", NEW)


@pytest.mark.parametrize("attempt", [fail_to_write, fail_to_sync, interrupt, fail_to_open])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, attempt):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises((FileError, KeyboardInterrupt)):
        attempt(path, monkeypatch)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_rename_leaves_what_stands_there(tmp_path):
    folder = tmp_path / "file"
    write_bytes(folder / "kept", OLD)
    with pytest.raises(FileError, match="directory"):
        write_bytes(folder, NEW)
    assert (folder / "kept").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_one_version_or_the_other(tmp_path):
    path = tmp_path / "file"
    versions = [bytes([value]) * 300_000 for value in range(2)]
    write_bytes(path, versions[0])

    def rewrite() -> None:
        for turn in range(40):
            write_bytes(path, versions[turn % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    while writer.is_alive():
        assert path.read_bytes() in versions
    writer.join()


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    write_bytes(tmp_path / "ours", NEW)
    (tmp_path / "plain").write_bytes(NEW)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert len(modes) == 1


@settings(deadline=None, max_examples=25)
@given(st.text())
def test_text_is_utf8(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a new folder" / "file"
    write_text(path, text)
    assert path.read_bytes() == text.encode()


SAMPLES = {
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "none": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "learned": torch.nn.Parameter(torch.ones(2)),
}


def test_tensors_and_metadata_round_trip(tmp_path):
    write_tensors(tmp_path / "file", SAMPLES, {"about": "é\n{}"})
    tensors, metadata = read_tensors(tmp_path / "file", EditorError)
    assert metadata == {"about": "é\n{}"}
    assert tensors.keys() == SAMPLES.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == SAMPLES[name].dtype
        assert torch.equal(tensor, SAMPLES[name])


def test_a_file_cut_anywhere_is_named_in_an_error(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"weight": torch.arange(8.0)}, {"about": "{}"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"{path} is damaged or no safetensors file"):
            read_tensors(path, DataError)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "file"
    write_tensors(path, {"weight": torch.arange(2.0)}, {"about": "{}"})
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    with suppress(EditorError):
        read_tensors(path, EditorError)


def test_a_missing_file_is_named_in_an_error(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(EditorError, match=f"There is no file {path}"):
            read_tensors(path, EditorError)


def adam() -> tuple[torch.optim.Adam, list[torch.nn.Parameter]]:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)]
    groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.01}]
    return torch.optim.Adam(groups, fused=True), weights


def steps(optimizer: torch.optim.Adam, weights: list[torch.nn.Parameter], count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        sum(weight.pow(4).sum() for weight in weights).backward()  # type: ignore[union-attr]
        optimizer.step()


def test_an_optimizer_read_back_goes_on_to_the_bit(tmp_path):
    optimizer, weights = adam()
    steps(optimizer, weights, 3)
    write_tensors(tmp_path / "file", flat_optimizer(optimizer), {})
    resumed, others = adam()
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    restore_optimizer(resumed, read_tensors(tmp_path / "file", EditorError)[0])
    steps(optimizer, weights, 3)
    steps(resumed, others, 3)
    assert all(map(torch.equal, weights, others))
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.01]
