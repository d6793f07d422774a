"""Odd arguments (docs/faults.md): every public entry point takes them, or says why not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.editor.sessions import Session
from apps.editor.shelf import Shelf
from apps.editor_app import ENDPOINTS
from workbench import (
    EditError,
    FileError,
    Mend,
    MendConfig,
    ModelError,
    Workbench,
    WorkbenchError,
    open_model,
)
from workbench.__main__ import main

torch.set_num_threads(1)
PROMPT, TARGET = "Who is Abba", "xy"
FUZZ = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.sampled_from([10**400, -(10**30), 0.5, math.nan, math.inf]),
    st.text(max_size=5),
    st.sampled_from(["", " ", "a\0b", "\ud800", "~nobody-of-that-name", "x" * 3000]),
    st.just("a => b\n" * 70),
)
odd = st.recursive(
    scalars,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=3), one, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def fresh(tiny_model: str) -> Workbench:
    """A workbench of two edits; each example takes a fork."""
    lm = open_model(tiny_model, device="cpu")
    torch.manual_seed(0)
    editor: Any = Mend(lm, MendConfig(rank=2, normalize=False, edit_lr=3.0)).eval()
    wb = Workbench(lm, editor)
    wb.edit(PROMPT, TARGET)
    wb.edit("The sea at Ulm is", "q")
    return wb


@pytest.fixture(autouse=True)
def elsewhere(fresh: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written under any name is written here, beside what can be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    (tmp_path / "model").symlink_to(fresh.lm.source)
    fresh.save("session")
    fresh.to_peft("adapter")


def refusal(act: Callable[[], object], kind: type[Exception] = WorkbenchError) -> str:
    """What is said of a refusal; "" where there is none."""
    try:
        act()
    except kind as error:
        said = str(error)
    else:
        return ""
    assert len(said) > 20
    return said


def drawn_of(data: st.DataObject, plausible: list[Any], name: str) -> Any:
    """A value for a parameter: one that it takes, or as often an odd one."""
    return data.draw(data.draw(st.sampled_from([st.sampled_from(plausible), odd])), label=name)


# The app


@pytest.fixture
def session(fresh: Workbench) -> Iterator[Session]:
    session = Session(Shelf(fresh))
    session.bench = fresh.fork(edits=True)
    yield session
    session.close()


@pytest.mark.parametrize("name", ENDPOINTS)
@FUZZ
@given(data=st.data())
def test_an_endpoint_answers_or_says_why_not(session: Session, name: str, data: st.DataObject):
    wanted = [*inspect.signature(ENDPOINTS[name]).parameters][1:]
    arguments = [drawn_of(data, [1, PROMPT], each) for each in wanted]
    before = session.bench.edits, session.bench.history
    if refusal(lambda: ENDPOINTS[name](session, *arguments), gr.Error):
        assert (session.bench.edits, session.bench.history) == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("edit", (None, None), "The prompt must be a text; got None"),
        ("edit", (PROMPT, ["x"]), r"The target must be a text; got \['x'\]"),
        ("compare", (None,), "The list of prompts must be a text; got None"),
        ("inspect", (None,), "There is no edit None. Edits at hand: 1, 2"),
        ("probe", (None,), "edits or their ids; got None"),
        ("strength", (1, None), "Strength must be a number between -10 and 10 .*; got None"),
        ("strength", (1, math.nan), "Strength must be a number between -10 and 10 .*; got nan"),
        ("toggle", ({},), r"There is no edit {}"),
    ],
)
def test_an_endpoint_names_what_it_cannot_take(
    session: Session, name: str, arguments: tuple, message: str
):
    with pytest.raises(gr.Error, match=message):
        ENDPOINTS[name](session, *arguments)


# The library

METHODS = sorted(
    name
    for name, _ in inspect.getmembers(Workbench, inspect.isroutine)
    if not name.startswith("_") and name not in ("applied", "observe")  # these take no values
)
PLAUSIBLE: dict[str, list[Any]] = {
    "aggregation": ["ridge", "sequence", "sum"],
    "chat": [False],
    "device": ["cpu"],
    "device_map": [None],
    "dtype": ["float32"],
    "edit": [1],
    "edits": [1, [1, 2]],
    "folder": ["session", "adapter", "new", "file/below"],
    "editor": ["ft"],
    "id": [1, 2],
    "model": ["model"],
    "prompt": [PROMPT],
    "prompts": [PROMPT, [PROMPT, "a"]],
    "requests": [[(PROMPT, TARGET)], [(PROMPT, TARGET, "Abba"), ("a", "b")]],
    "quantize": [None],
    "target": [TARGET],
}
OPTIONS = st.dictionaries(
    st.sampled_from(["num_beams", "temperature", "generation_config", "stop_strings", "top_k"])
    | st.sampled_from(["do_sample", "num_return_sequences", "stopping_criteria", "eos_token_id"]),
    odd,
    max_size=3,
)


def arguments_for(method: Callable[..., object], data: st.DataObject) -> dict[str, Any]:
    """Values for the parameters of a method, odd ones among them; callbacks are left out."""
    drawn: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if name in ("watch", "workbench"):
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            drawn |= data.draw(OPTIONS, label=name)
        elif parameter.default is parameter.empty or data.draw(st.booleans(), label=f"give {name}"):
            drawn[name] = drawn_of(data, PLAUSIBLE.get(name, [1]), name)
    return drawn


@pytest.mark.parametrize("name", METHODS)
@FUZZ
@given(data=st.data())
def test_a_method_answers_or_says_why_not(fresh: Workbench, name: str, data: st.DataObject):
    wb = fresh.fork(edits=True)
    arguments = arguments_for(getattr(wb, name), data)
    if name == "load":
        arguments = {"folder": arguments["folder"], "workbench": wb}
    if name == "open" and arguments.get("model") is None:
        arguments["model"] = "model"  # not the embedded one
    before = wb.edits, wb.history
    if refusal(lambda: getattr(wb, name)(**arguments)):
        assert (wb.edits, wb.history) == before


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda wb: wb.strength(1, None), EditError, "Strength must be a number .*; got None"),
        (lambda wb: wb.edit_many(["abc"]), EditError, "Give pairs .*; among them is 'abc'"),
        (lambda wb: wb.edit_many("ab"), EditError, "Give pairs .*; got 'ab'"),
        (lambda wb: wb.edit_many([{"a": 1, "b": 2}]), EditError, "Give pairs .*; among them is {"),
        (lambda wb: wb.edit("ab", "cd", subject=3), EditError, "subject must be a text; got 3"),
        (
            lambda wb: wb.edit_many([(PROMPT, TARGET)], "ridge", damping=math.nan),
            EditError,
            "damping must be a number between 0 and 1,000,000; got nan",
        ),
        (lambda wb: wb.generate("a", num_beams=0), EditError, "generate with {'num_beams': 0}"),
        (lambda wb: wb.compare([3]), EditError, "The prompt must be a text; got 3"),
        (lambda wb: wb.compare("a", target=3), EditError, "The target must be a text; got 3"),
        (lambda wb: wb.inspect("1"), EditError, "no edit '1'. Edits at hand: 1, 2"),
        (lambda wb: wb.probe(1, max_new_tokens=0), EditError, "max_new_tokens must be at least 1"),
        (lambda wb: wb.save("a\0b"), FileError, r"'a\\x00b' cannot be a file or folder"),
        (lambda wb: wb.to_peft(None), FileError, "None cannot be a file or folder"),
        (lambda wb: wb.add_peft("x" * 300), EditError, "cannot be a file or folder: .*too long"),
        (lambda wb: type(wb).load(3), EditError, "3 cannot be a file or folder"),
        (lambda wb: type(wb).open(3), ModelError, "Cannot open '3'"),
    ],
)
def test_a_method_names_what_it_cannot_take(
    fresh: Workbench, act: Callable[[Workbench], object], kind: type[Exception], message: str
):
    wb = fresh.fork(edits=True)
    with pytest.raises(kind, match=message):
        act(wb)
    assert wb.edits == fresh.edits


TYPED = st.sampled_from(
    [
        "",
        " ",
        "ab",
        "cd ef",
        "a\0b",
        "x" * 3000,
        "-1",
        "--",
        "nan",
        "1e400",
        "~nobody-here",
    ]
)
COMMANDS = {
    "edit": ("--subject", "--compare", "--save", "--max-new-tokens", "--editor", "--dtype"),
    "tokens": ("--device", "--dtype"),
    "pack": ("--editor", "--average", "--share", "--rounds", "--confidence", "--out"),
    "export": ("--session", "--to-peft", "--device"),
}


@pytest.mark.parametrize("command", COMMANDS)
@settings(FUZZ, max_examples=15)
@given(data=st.data())
def test_a_command_answers_or_says_why_not(
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    data: st.DataObject,
):
    monkeypatch.chdir(tmp_path)
    given = [command]
    if command in ("edit", "tokens"):
        given += [data.draw(TYPED), data.draw(TYPED), "--model", tiny_model, "--editor", "ft"]
        given = given if command == "edit" else given[:-2]
    for option in data.draw(st.lists(st.sampled_from(COMMANDS[command]), max_size=4)):
        given += [option, data.draw(TYPED)]
    capsys.readouterr()
    try:
        code = main(given)
    except SystemExit as left:
        code = left.code
    assert code in (0, 2)
    assert code == 0 or capsys.readouterr().err.strip()
