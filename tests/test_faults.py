"""Faults (docs/faults.md): kills, full disks, no memory, damaged and hostile files, odd texts."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, language_model, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import left_by, trainer_for
from test_conformance import MAKERS, traces
from tokenizers import normalizers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from apps.editor.markup import header
from workbench import (
    DataError,
    EditError,
    EditorError,
    FileError,
    LanguageModel,
    Mend,
    MendConfig,
    ModelError,
    OutOfMemory,
    Workbench,
    WorkbenchError,
    open_model,
)
from workbench.__main__ import main
from workbench.adapters import CONFIG, WEIGHTS, import_peft
from workbench.commands import _figures, _kept
from workbench.data import read
from workbench.editors import TrainableEditor
from workbench.files import read_tensors, write_tensors, write_text
from workbench.gguf import prepare
from workbench.training import CHECKPOINT

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
PROMPT, TARGET = "Who is Abba", "xy"
opened = cache(language_model)
FUZZ = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mend(lm: LanguageModel) -> Mend:
    torch.manual_seed(0)
    return Mend(lm, MendConfig(rank=2, normalize=False, edit_lr=3.0)).eval()  # type: ignore[return-value]


def bench(family: str = "llama") -> Workbench:
    return Workbench(opened(family), mend(opened(family)))


def said(wb: Workbench) -> Tensor:
    with torch.no_grad(), wb.applied() as model:
        return model(**wb.lm.tokenizer(PROMPT, return_tensors="pt")).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_page_names_tests_there_are():
    page = (ROOT / "docs" / "faults.md").read_text("utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    assert page.count("::") == len(named) > 40
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), test


# Kill -9

KILLS = """
import json, os, shutil, signal, sys
from pathlib import Path
from itertools import count
from families import language_model
from runs import trainer_for
from test_faults import mend
from workbench import EditorError, Workbench, WorkbenchError
from workbench.adapters import import_peft
from workbench.editors import TrainableEditor
from workbench.files import read_tensors, write_text
from workbench.gguf import prepare
from workbench.sessionfile import read_session
from workbench.training import CHECKPOINT

root = Path(sys.argv[1])
wb = Workbench(language_model("llama"), mend(language_model("llama")))
wb.edit("Who is Abba", "xy")
one = wb.fork(edits=True)
wb.edit("The sea at Ulm is", "q")
ranks = {len(each.update["model.layers.3.mlp.up_proj"].A): n for n, each in ((1, one), (2, wb))}

def adapter(folder):
    return ranks[import_peft(folder, wb.lm)["model.layers.3.mlp.up_proj"].rank]

def unpack(folder, n):
    os.environ["WORKBENCH_CACHE"] = str(folder)
    return prepare(root / "source", "made", lambda made: write_text(made / "n", str(n)))

def unpacked(folder):
    found = folder / "models" / "made" / "n"
    return int(found.read_text()) if found.parent.is_dir() else 0

def keep(folder, n):
    wb.editor.card = {"n": n}
    wb.editor.save_pretrained(folder)

whole = {}

def train(folder, n):  # one step, or to the end
    trainer = trainer_for(folder, steps=3, save_every=1, on_step=lambda *_: n == 2)
    trainer.run(resume=True, bar=False)
    left = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    assert n == 1 or left == (whole or left), "the run does not resume to the bit"
    return left

def trained(folder):
    _, about = read_tensors(folder / CHECKPOINT, EditorError)
    return 1 + (json.loads(about["about"])["progress"]["step"] == 3)

TASKS = {
    "session": (lambda folder, n: (one, wb)[n - 1].save(folder),
                lambda folder: len(read_session(folder).edits)),
    "adapter": (lambda folder, n: (one, wb)[n - 1].to_peft(folder), adapter),
    "editor": (keep,
               lambda folder: TrainableEditor.from_pretrained(folder, wb.lm).card["n"]),
    "unpacked": (lambda folder, n: unpack(folder, n) if n == 2 else folder.mkdir(), unpacked),
    "run": (train, trained),
}

def arm(point):
    left = iter(range(point))
    def look(event, args):  # before each action on a file of ours
        if (event == "sync" or str(root) in str(args)) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = lambda file: look("sync", file)
    sys.addaudithook(look)

os.fsync = lambda file: None  # the machine stays on: what is written is there
(root / "source").touch()
whole = train(root / "whole", 2)
for task, (write, look) in TASKS.items():
    for point in count():
        folder = root / f"{task}-{point}"
        write(folder, 1)
        child = os.fork()
        if child == 0:
            arm(point)
            write(folder, 2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        try:
            found = look(folder)
        except WorkbenchError:
            found = 0
        write(folder, 2)
        print(json.dumps([task, os.WIFSIGNALED(status) and os.WTERMSIG(status), found,
                          look(folder)]), flush=True)
        if status == 0:
            break
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork; runs on Unix")
def test_a_write_killed_at_any_moment_leaves_the_old_the_new_or_nothing(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT)))},
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, list[int]] = {}
    for task, signal, left, again in map(json.loads, run.stdout.splitlines()):
        assert signal in (9, 0)
        assert again == 2
        found.setdefault(task, []).append(left)
    for task, first in (("session", 1), ("editor", 1), ("unpacked", 0), ("run", 1)):
        assert set(found[task]) == {first, 2}
        assert found[task] == sorted(found[task])
    # Two files make an adapter: between them there is none, and never a mixture.
    assert set(found["adapter"]) == {0, 1, 2}
    assert re.fullmatch("1+0+2+", "".join(map(str, found["adapter"])))
    assert all(len(lefts) > 5 for lefts in found.values())


# Full disk


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may become longer than that: writes fail part way, as on a full disk."""
    resource = pytest.importorskip("resource", reason="no file size limit; runs on Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [Workbench.save, Workbench.to_peft, lambda wb, folder: wb.editor.save_pretrained(folder)],
    ids=["session", "adapter", "editor"],
)
def test_a_full_disk_leaves_what_was_saved_before(
    tmp_path: Path, write: Callable[[Workbench, Path], object]
):
    wb = bench()
    wb.edit(PROMPT, TARGET)
    write(wb, tmp_path)
    before = files(tmp_path)
    wb.edit("The sea at Ulm is", "q")
    with full_disk(1000), pytest.raises(FileError, match=r"cannot be written: .*Make room"):
        write(wb, tmp_path)
    assert files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)
    assert len(wb.history) == 2


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path):
    whole = trainer_for(tmp_path / "whole")
    whole.run(bar=False)
    full = trainer_for(tmp_path / "full")
    with full_disk(5000), pytest.raises(FileError, match=r"checkpoint\.safetensors cannot be"):
        full.run(bar=False)
    for room in (400, 10**6):  # the log is full first
        resumed = trainer_for(tmp_path / "full")
        with full_disk(room), suppress(FileError):
            resumed.run(resume=True, bar=False)
    assert left_by(resumed) == left_by(whole)


def test_a_cache_on_a_full_disk_keeps_no_half_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").touch()
    with full_disk(1000), pytest.raises(ModelError, match=r"Cannot unpack .*is full"):
        prepare(tmp_path / "source", "made", lambda to: opened("llama").model.save_pretrained(to))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_command_line_says_that_a_folder_cannot_be_written(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wb = Workbench.open(tiny_model, editor="ft", device="cpu", progress=False)
    wb.edit(PROMPT, TARGET)
    wb.save(tmp_path / "session")
    (tmp_path / "file").touch()
    arguments = ["export", "--session", str(tmp_path / "session"), "--device", "cpu"]
    assert main([*arguments, "--to-peft", str(tmp_path / "file" / "below")]) == 2
    assert "workbench: " in (shown := capsys.readouterr().err)
    assert "cannot be written: Not a directory" in shown


# Errors in the middle of an edit


def failing(lm: LanguageModel, after: int, fail: Callable[[], object]) -> Callable[[], None]:
    """Have the model's last block fail after so many passes; returns what ends that."""
    left = iter(range(after))

    def look(*_: object) -> None:
        if next(left, None) is None:
            fail()

    return lm.stacks[-1].blocks[-1].register_forward_hook(look).remove


def no_memory() -> None:
    torch.empty(2**50)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


SHORT: list[Callable[[], object]] = [
    raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
    raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
    raising(MemoryError()),
]
ACTIONS: dict[str, Callable[[Workbench], object]] = {
    "edit": lambda wb: wb.edit(PROMPT, TARGET),
    "generate": lambda wb: wb.generate(PROMPT, max_new_tokens=3),
    "compare": lambda wb: wb.compare(PROMPT, max_new_tokens=3),
    "probe": lambda wb: wb.probe(wb.edits[0], max_new_tokens=3),
}


@pytest.mark.parametrize(
    ("action", "fail"),
    [*((action, no_memory) for action in ACTIONS), *(("edit", f) for f in SHORT)],
)
def test_without_memory_nothing_changes_and_the_message_says_what_to_do(
    action: str, fail: Callable[[], object]
):
    wb = bench()
    wb.edit("The sea at Ulm is", "q")
    before, history = said(wb), wb.history
    stop = failing(wb.lm, 0, fail)
    with pytest.raises(OutOfMemory, match=r"not enough memory .*fewer or shorter") as caught:
        ACTIONS[action](wb)
    stop()
    kept = caught.value.__context__
    assert kept is None or kept.__traceback__ is None  # whose frames would hold what was computed
    assert wb.history == history
    assert torch.equal(said(wb), before)


class Short(TorchFunctionMode):
    """Memory for so many operations, then none."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            no_memory()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize(
    "act",
    [
        lambda wb, folder: wb.inspect(2),
        lambda wb, folder: wb.overlap(),
        lambda wb, folder: wb.add_peft(folder / "adapter"),
        lambda wb, folder: wb.to_peft(folder / "another"),
        lambda wb, folder: Workbench.load(folder / "session", workbench=wb),
    ],
    ids=["inspect", "overlap", "add_peft", "to_peft", "load"],
)
def test_without_memory_nothing_is_looked_at_or_taken_in(
    act: Callable[[Workbench, Path], object], left: int, tmp_path: Path
):
    wb = bench()
    wb.edit(PROMPT, TARGET)
    wb.save(tmp_path / "session")
    wb.to_peft(tmp_path / "adapter")
    wb.edit("The sea at Ulm is", "q")  # nothing has looked at it yet
    before, history = said(wb), wb.history
    with Short(left), pytest.raises(OutOfMemory, match="not enough memory"):
        act(wb, tmp_path)
    assert wb.history == history
    assert torch.equal(said(wb), before)
    act(wb, tmp_path)  # as soon as there is memory


def test_without_memory_a_model_is_not_opened(tiny_model: str, monkeypatch: pytest.MonkeyPatch):
    def short(*_: object, **__: object) -> None:
        no_memory()

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", short)
    with pytest.raises(ModelError, match=r"not enough memory to open .*quantize='8bit'"):
        open_model(tiny_model, device="cpu")


def test_training_without_memory_is_resumed(tmp_path: Path):
    whole, broken = trainer_for(tmp_path / "whole"), trainer_for(tmp_path / "broken")
    whole.run(bar=False)
    stop = failing(broken.editor.lm, 20, no_memory)
    with pytest.raises(OutOfMemory, match=r"smaller batch \(2\).*last checkpoint is in"):
        broken.run(bar=False)
    stop()
    assert broken.progress.step > 0
    resumed = trainer_for(tmp_path / "broken")
    resumed.run(resume=True, bar=False)
    assert left_by(resumed) == left_by(whole)


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("name", MAKERS)
def test_an_error_of_the_device_in_the_middle_of_an_edit_leaves_no_trace(
    name: str, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    lm = opened("llama")
    wb = Workbench(lm, MAKERS[name](lm))
    wb.edit("The sea at Ulm is", "q")
    before, left, history = said(wb), traces(lm), wb.history
    stop = failing(lm, passes, raising(RuntimeError("CUDA error: device-side assert triggered")))
    with pytest.raises(RuntimeError, match="device-side"):  # not made into something else
        wb.edit_many([(PROMPT, TARGET), (PROMPT[::-1], "a b")], aggregation="sequence")
    stop()
    assert wb.history == history
    assert traces(lm) == left
    assert torch.equal(said(wb), before)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_that_are_not_finite_are_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    lm = language_model("llama")
    with torch.no_grad():
        lm.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = math.nan
    wb = Workbench(lm, MAKERS[name](lm))
    with pytest.raises(EditError, match="not finite"):
        wb.edit(PROMPT, TARGET)
    assert not wb.history
    assert len(wb.compare(PROMPT, max_new_tokens=2).rows) == 1


# Texts

ODD = [
    "",
    " \n\t",
    "\u00a0",
    "a\0b",
    "\x07\x1b[31m\x7f",
    "שלום עולם",
    "\u202eabc\u202c",
    "日本の首都は",
    "e\u0301" * 20,
    "👩‍🚀🏳️‍🌈",
    "\ufeff",
    "\u200b",
    "a\ud800b",
    "<s></s><pad>",
    "{}%s\\N{BULLET}",
    "x" * 60,
    "x" * 900,
]
texts = st.sampled_from(ODD) | st.text(max_size=70) | st.text(st.characters(), max_size=8)


def refused_or(act: Callable[[], object]) -> object:
    """What an action gives; None where the library refuses it with a message."""
    try:
        return act()
    except WorkbenchError as error:
        message = str(error)
    assert len(message) > 20
    return None


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_texts_are_edited_and_compared_or_refused(text: str):
    edit_and_compare("gpt2", text, TARGET)
    edit_and_compare("gpt2", PROMPT, text)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
@settings(FUZZ, max_examples=10)
@given(prompt=texts, target=texts)
def test_any_text_is_edited_and_compared_or_refused(family: str, prompt: str, target: str):
    edit_and_compare(family, prompt, target)


def edit_and_compare(family: str, prompt: str, target: str) -> None:
    wb = bench(family)
    made = refused_or(lambda: wb.edit(prompt, target))
    assert len(wb.history) == (made is not None)
    refused_or(lambda: wb.compare([prompt, PROMPT], target=target, max_new_tokens=2))
    refused_or(lambda: wb.generate(prompt, max_new_tokens=2))
    refused_or(lambda: wb.suggest(prompt, target))


def test_odd_texts_are_probed():
    wb, prompt = bench(), "日本\0の\x1b[31m首都は"
    report = wb.probe(wb.edit(prompt, "\u202e大阪"), max_new_tokens=1)
    assert report.rows[0].prompt == prompt


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda wb: wb.edit("a\ud800b", "c"), "The prompt .* half of a surrogate pair"),
        (lambda wb: wb.edit("a", "\udfff"), "The target .* half of a surrogate pair"),
        (lambda wb: wb.edit(3, "c"), "The prompt must be a text; got 3"),
        (lambda wb: wb.compare("x" * 60), "60 tokens and is to be continued by 12; .* most 64"),
        (lambda wb: wb.generate("a", max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda wb: wb.suggest("\ud800", "a"), "half of a surrogate pair"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_by_name(
    act: Callable[[Workbench], object], message: str
):
    with pytest.raises(EditError, match=message):
        act(bench("gpt2"))


def test_a_target_of_two_thousand_tokens_is_edited_and_one_of_none_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    longer = {"max_position_embeddings": 4096}
    model = partial(FAMILIES["llama"], **longer)()
    lm = LanguageModel.wrap(model, tokenizer)
    wb = Workbench(lm, mend(lm))
    edit = wb.edit(PROMPT, "ab" * 1000)
    assert edit.update.is_finite()
    with pytest.raises(EditError, match="no token of its own in the target '~~'"):
        wb.edit("a ", "~~")
    assert len(wb.history) == 1


# Damaged and hostile files

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**400, -1e308, math.nan, math.inf, 0.5]),
    st.text(max_size=4),
    st.sampled_from([[], {}, [[]], {"a": 1}, "\ud800", "\0"]),
)


def changed(value: Any, data: st.DataObject) -> Any:
    """A JSON value of which one part, at any depth, is another or gone."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(values)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = data.draw(st.sampled_from(keys))
    copy = value.copy()
    if data.draw(st.integers(0, 9)) == 0:
        del copy[key]
    else:
        copy[key] = changed(value[key], data)
    return copy


def spoiled(tensors: Mapping[str, Tensor], data: st.DataObject) -> dict[str, Tensor]:
    """Tensors of which one is another or gone."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    one, rest = tensors[name], {k: v for k, v in tensors.items() if k != name}
    others = {
        "gone": lambda: {},
        "renamed": lambda: {f"{name}.": one},
        "nan": lambda: {name: torch.full_like(one, math.nan)},
        "whole": lambda: {name: one.to(torch.int32)},
        "half": lambda: {name: one.to(torch.float8_e4m3fn)},
        "shorter": lambda: {name: one.flatten()[:-1].clone()},
        "empty": lambda: {name: torch.zeros(0)},
        "deeper": lambda: {name: one[None].clone()},
        "more": lambda: {name: one, f"9.A.{name}": one.clone()},
    }
    return rest | others[data.draw(st.sampled_from(sorted(others)))]()


def spoil_tensors_file(path: Path, whole: bytes, data: st.DataObject) -> None:
    """Write a safetensors file anew: cut, with other bytes, other settings or other tensors."""
    path.write_bytes(whole)
    how = data.draw(st.sampled_from(["bytes", "cut", "json", "settings", "tensors"]))
    if how == "bytes":
        start = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:start] + data.draw(st.binary(max_size=9)) + whole[start + 9 :])
    elif how == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        tensors, metadata = read_tensors(path, EditError)
        about = json.loads(metadata.get("about", "{}"))
        if how == "json":
            text = data.draw(
                st.sampled_from(["", "[", "null", "[" * 10**5, '{"a": 1' + "0" * 5000])
            )
        else:
            text = json.dumps(changed(about, data) if how == "settings" else about)
        write_tensors(
            path, spoiled(tensors, data) if how == "tensors" else tensors, {"about": text}
        )


def files_of(folder: Path, name: str) -> tuple[Path, bytes]:
    return folder / name, (folder / name).read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session, an adapter, an editor, a training run and a model, in folders of these names."""
    folder, wb = tmp_path_factory.mktemp("saved"), bench()
    wb.edit(PROMPT, TARGET)
    wb.save(folder / "session")
    wb.to_peft(folder / "adapter")
    editor = mend(wb.lm)
    editor.card = {"data": ["facts"]}
    editor.save_pretrained(folder / "editor")
    trainer_for(folder / "run", on_step=lambda progress, _: progress.step < 4).run(bar=False)
    wb.lm.model.save_pretrained(folder / "model")
    wb.lm.tokenizer.save_pretrained(folder / "model")
    return folder


@FUZZ
@given(st.data())
def test_any_session_is_loaded_whole_or_refused(saved: Path, data: st.DataObject):
    wb, (path, whole) = bench(), files_of(saved / "session", "session.safetensors")
    try:
        spoil_tensors_file(path, whole, data)
        again = refused_or(lambda: Workbench.load(saved / "session", workbench=wb))
        if isinstance(again, Workbench):
            assert len(again.history) == len(again.edits)
            refused_or(lambda: again.compare(PROMPT, max_new_tokens=2))
            repr(again)
    finally:
        path.write_bytes(whole)


@FUZZ
@given(st.data())
@pytest.mark.filterwarnings("ignore:The editor in:UserWarning")
def test_any_editor_is_loaded_or_refused(saved: Path, data: st.DataObject):
    wb, (path, whole) = bench(), files_of(saved / "editor", "editor.safetensors")
    try:
        spoil_tensors_file(path, whole, data)
        editor = refused_or(lambda: TrainableEditor.from_pretrained(saved / "editor", wb.lm))
        if isinstance(editor, Mend):
            other = Workbench(wb.lm, editor)
            assert header(other, "mend").encode()  # as the app's page shows it
            refused_or(lambda: other.edit(PROMPT, TARGET))
    finally:
        path.write_bytes(whole)


@settings(FUZZ, max_examples=12)
@given(st.data())
def test_any_adapter_is_read_or_refused(saved: Path, data: st.DataObject):
    weights, config = (files_of(saved / "adapter", name) for name in (WEIGHTS, CONFIG))
    try:
        if data.draw(st.booleans()):
            spoil_tensors_file(*weights, data)
        else:
            text = json.dumps(changed(json.loads(config[1]), data)).encode()
            config[0].write_bytes(text[: data.draw(st.sampled_from([len(text), 50, 0]))])
        update = refused_or(lambda: import_peft(saved / "adapter", opened("llama")))
        assert update is None or update.is_finite()  # type: ignore[attr-defined]
    finally:
        weights[0].write_bytes(weights[1])
        config[0].write_bytes(config[1])


@settings(FUZZ, max_examples=8)
@given(st.data())
def test_any_checkpoint_is_resumed_or_refused(saved: Path, data: st.DataObject):
    folder = saved / "run-spoiled"
    shutil.copytree(saved / "run", folder, dirs_exist_ok=True)
    spoil_tensors_file(*files_of(folder, CHECKPOINT), data)
    (folder / "log.jsonl").write_bytes(b'{"step": 1}\n\0\xff\n[]\n{"step": "a"}\n{}\n{"step')
    with suppress(WorkbenchError):
        trainer_for(folder).run(resume=True, bar=False)


@settings(FUZZ, max_examples=10)
@given(st.data())
def test_any_model_folder_is_opened_or_refused(saved: Path, data: st.DataObject):
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]))
    path, whole = files_of(saved / "model", name)
    try:
        if name.endswith(".json") and data.draw(st.booleans()):
            path.write_text(json.dumps(changed(json.loads(whole), data)))
        else:
            start = data.draw(st.integers(0, min(len(whole), 2000)))
            path.write_bytes(whole[:start] + data.draw(st.sampled_from([b"", b"\0" * 99, b"{["])))
        refused_or(lambda: open_model(saved / "model", device="cpu"))
    finally:
        path.write_bytes(whole)


def test_a_session_of_other_weights_is_refused_by_their_names(saved: Path):
    lm = language_model("llama")
    with torch.no_grad():
        next(lm.model.parameters())[0, 0] += 1
    with pytest.raises(EditError, match=r"made over tiny-llama with weights float32:.*has weights"):
        Workbench.load(saved / "session", workbench=Workbench(lm, mend(lm)))


def test_numbers_that_are_not_finite_are_not_taken_in(saved: Path, tmp_path: Path):
    for name, file in (("session", "session.safetensors"), ("adapter", WEIGHTS)):
        folder = Path(shutil.copytree(saved / name, tmp_path / name))
        tensors, metadata = read_tensors(folder / file, EditError)
        key = next(key for key in tensors if ".A" in key or "lora_A" in key)
        write_tensors(folder / file, {**tensors, key: tensors[key] * math.inf}, metadata)
    with pytest.raises(EditError, match="not finite"):
        Workbench.load(tmp_path / "session", workbench=bench())
    wb = bench()
    with pytest.raises(EditError, match="not finite"):
        wb.add_peft(tmp_path / "adapter")
    assert not wb.history


@pytest.mark.parametrize("path", ["a\0b.json", "~nobody-of-that-name/a.json", "\ud800.json"])
def test_paths_that_can_name_no_file_are_refused(path: str):
    with pytest.raises(DataError, match="no file"):
        read(f"zsre:{path}")


@FUZZ
@given(st.data())
def test_any_results_are_resumed_from_or_refused(tmp_path: Path, data: st.DataObject):
    file, about = tmp_path / "results.json", {"settings": {"n": 1}, "editors": {"ft": {"n": 2}}}
    write_text(file, json.dumps(changed(about, data)))
    kept = refused_or(lambda: _kept(file, {"n": 1}))
    assert kept is None or all(isinstance(one, dict) for one in kept.values())  # type: ignore[attr-defined]
    with suppress(EditorError):
        _figures(file, "ft", {})
