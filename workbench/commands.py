"""What the commands of `python -m workbench` do."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from hashlib import sha256
from itertools import compress
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from tqdm.auto import tqdm

from workbench import parallel
from workbench.continuations import continuations
from workbench.corpus import SENTENCES
from workbench.data import Dataset, EditExample, read, texts
from workbench.editors import (
    Editor,
    Mend,
    TrainableEditor,
    open_editor,
    push_editor,
    trainable_editors,
)
from workbench.errors import DataError, EditorError, ModelError
from workbench.evaluate import Baselines, EvaluationConfig, knows
from workbench.evaluate import evaluate as evaluate_editor
from workbench.files import MALFORMED, write_text
from workbench.masks import token_table
from workbench.models import LanguageModel, open_model
from workbench.probes import Probe
from workbench.session import Workbench
from workbench.sharing import known_as
from workbench.shortage import memory_errors
from workbench.training import Trainer, TrainingConfig, learn_scope, with_scope
from workbench.training.tensorboard import tensorboard_log


def edit(options: argparse.Namespace) -> None:
    """Make one edit; print the prompt, its equivalents, neighbours and unrelated prompts."""
    bench = Workbench.open(options.model, editor=options.editor, **_held(options))
    made = bench.edit(options.prompt, options.target, options.subject)
    extra = [Probe(prompt, "other", options.target, "as given") for prompt in options.compare]
    probes = (*bench.suggest(options.prompt, options.target), *extra)
    print(f"{bench.lm.source} on {bench.lm.device}, editor {bench.editor.name}")
    print(f"edit {made.id}: {made.title}  ({made.seconds:.2f} s; acts {made.acts})\n")
    for row in bench.compare(probes, max_new_tokens=options.max_new_tokens).rows:
        print(f"[{row.kind}] {row.prompt}")
        print(f"    before  {shorten(row.base_text.strip(), 70)}")
        print(f"    after   {shorten(row.edited_text.strip(), 70)}")
        if row.target is not None:
            print(
                f"    p({row.target!r})  {row.base_probability:.4f} -> {row.edited_probability:.4f}"
            )
    if options.save:
        bench.save(options.save)
        print(f"\nsession saved in {options.save}")


def tokens(options: argparse.Namespace) -> None:
    """Print the tokens of an edit, each with its id and whether its loss would count."""
    print(token_table(_open(options), [(options.prompt, options.target)]))


def train(options: argparse.Namespace) -> None:
    """Meta-train an editor on one or several data sets."""
    lm = _open(options)
    split = None if options.split == "all" else options.split
    examples = [e for spec in options.data for e in _read(spec, split, options, lm)]
    if options.validation_data:
        validation = list(_read(options.validation_data, "dev", options, lm))
    else:
        validation = [e for spec in options.data for e in _read(spec, "dev", options, lm)]
        examples = [e for e in examples if e.split != "dev"]  # what is looked at is not learned
    unrelated = texts(options.unrelated, split=split) if options.unrelated else list(SENTENCES)
    cls = trainable_editors()[options.editor]
    given = settings_of(TrainingConfig, options)
    config = TrainingConfig(**{**cls.training_defaults, **given})
    editor = _new_editor(cls, lm, options, config.seed)
    # Spread over the whole file, not its beginning.
    validation = validation[:: max(1, len(validation) // max(1, config.validation))]
    logs = options.tensorboard and parallel.leads()
    board = tensorboard_log(options.tensorboard) if logs else nullcontext()
    with board as on_record:
        trainer = Trainer(
            editor,
            examples,
            unrelated,
            config,
            options.out,
            validation=validation,
            card={
                "data": [_file_name(spec) for spec in options.data],
                "split": options.split,
                "examples": len(examples),
                "chat": lm.chat,
                "start": dict(editor.card) or None,
            },
            on_record=on_record,
            cache_folder=options.cache_folder,
        )
        progress = trainer.run(resume=options.resume)
    _say(
        f"{progress.step} steps; best validation loss {progress.best_loss:.4f} at step "
        f"{progress.best_step}; editor in {options.out}"
    )


def scope(options: argparse.Namespace) -> None:
    """Learn the scope of a MEND editor's edits, and write the editor with it."""
    lm = _open(options)
    editor = with_scope(open_editor(options.editor, lm), **settings_of(Mend.config_class, options))
    split = None if options.split == "all" else options.split
    examples = [e for spec in options.data for e in _read(spec, split, options, lm)]
    with memory_errors():
        found = vars(learn_scope(editor, examples, steps=options.steps, seed=options.seed))
    about = {name: getattr(options, name) for name in ("split", "limit", "steps", "seed")} | found
    about["data"] = [_file_name(spec) for spec in options.data]
    editor.card = {k: v for k, v in editor.card.items() if k != "evaluation"} | {"scope": about}
    print(", ".join(f"{name} {value:g}" for name, value in found.items()))
    print(f"editor in {editor.save_pretrained(options.out)}")


def _new_editor(
    cls: type[TrainableEditor], lm: LanguageModel, options: argparse.Namespace, seed: int
) -> TrainableEditor:
    """A fresh editor, or a copy of the one that training starts from, given a gate if asked."""
    settings = settings_of(cls.config_class, options)
    for other in trainable_editors().values():
        foreign = settings_of(other.config_class, options).keys() - settings.keys()
        if foreign:
            raise EditorError(
                f"{_flags(foreign)}: {other.name} has such settings, {cls.name} has not. Its own: "
                f"{_flags(field.name for field in fields(cls.config_class))}."
            )
    if not options.start:
        torch.manual_seed(seed)
        return cls.from_settings(lm, settings)
    editor = TrainableEditor.from_pretrained(options.start, lm)
    if not isinstance(editor, cls):
        raise EditorError(
            f"{options.start} holds a {editor.name!r} editor: start from it with --editor "
            f"{editor.name}."
        )
    if isinstance(editor, Mend):
        return editor.changed(**settings)
    if other := {k: v for k, v in settings.items() if getattr(editor.config, k) != v}:
        raise EditorError(
            f"{options.start} was trained with other editor settings than {other}. Leave them out "
            f"(--start brings its own), or leave out --start to train a new editor."
        )
    return editor


def _flags(settings: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(settings))


def evaluate(options: argparse.Namespace) -> None:
    """Measure editors on a data set; print a table, and write JSON if asked."""
    lm = _open(options)
    config = EvaluationConfig(**settings_of(EvaluationConfig, options))
    examples: Sequence[EditExample] = _read(options.data, options.split, options, lm)
    if options.known:
        right = knows(lm, [(e.prompt, e.target_true or e.target) for e in examples])
        _say(f"{lm.source} knows {sum(right)} of {len(right)} answers; only those are edited")
        examples = list(compress(examples, right))
        if not examples:
            raise DataError("Nothing is left to edit: leave out --known, or give other data.")
    result: dict[str, Any] = {
        "settings": {
            "model": lm.source,
            "fingerprint": lm.fingerprint(),
            "dtype": str(lm.dtype).removeprefix("torch."),
            "chat": lm.chat,
            "data": _file_name(options.data),
            "split": options.split,
            "limit": options.limit,
            "known": options.known,
            **vars(config),
            "damping": config.damping if config.aggregation == "ridge" else None,
        },
        "editors": {},
    }
    kept = _kept(options.json, result["settings"]) if options.resume else {}
    parallel.agree(len(kept), f"the editors measured in {options.json}")
    baselines = Baselines()
    for name in [name.strip() for name in options.editors.split(",")]:
        editor = open_editor(name, lm)
        about = _identity(editor)
        if name in kept and about.items() <= kept[name].items():
            result["editors"][name] = kept[name]
            continue
        start = time.perf_counter()
        bars = tqdm(
            total=len(parallel.share(examples)),
            desc=name,
            disable=None if parallel.leads() else True,
        )
        with memory_errors(), bars as bar:
            scores = evaluate_editor(
                editor, examples, config, on_edit=lambda _: bar.update(), baselines=baselines
            )
        about["seconds"] = round(time.perf_counter() - start, 1)
        about["device"] = _device_name(lm)
        result["editors"][name] = scores.as_json() | about
        if options.json and parallel.leads():
            found = {**result, "editors": kept | result["editors"]}
            write_text(options.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if parallel.leads():
        _print_table(result["editors"])


def _kept(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Editors that an earlier run has measured in the same way, and their figures."""
    if file is None:
        raise DataError("--resume goes on with the file of an earlier run: name it with --json.")
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        before, editors = dict(found["settings"]), dict(found["editors"])
        editors = {name: dict(figures) for name, figures in editors.items()}
    except (OSError, *MALFORMED) as error:
        raise DataError(
            f"{file} holds no results of evaluate ({error!r}): give another --json."
        ) from None
    # What an older file does not name was not asked for.
    if other := {k for k in settings if (before.get(k) or None) != (settings[k] or None)}:
        raise DataError(
            f"{file} holds results of other settings: {', '.join(sorted(other))} differ. Give the "
            f"same, or another --json."
        )
    return editors


def _identity(editor: Editor) -> dict[str, Any]:
    """What figures of an editor are figures of: settings, and a fingerprint of what it learned."""
    weights = None
    if isinstance(editor, TrainableEditor):
        digest = sha256()
        for name, tensor in sorted(editor.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        weights = digest.hexdigest()[:16]
    return {"settings": editor.settings(), "weights": weights}


def pack(options: argparse.Namespace) -> None:
    """Write a trained editor for sharing, in float16; changed and with its figures if asked."""
    lm = _open(options)
    editor = TrainableEditor.from_pretrained(options.editor, lm)
    card, before = dict(editor.card), _identity(editor)
    if options.average:
        _average(editor, TrainableEditor.from_pretrained(options.average, lm), options.share)
        mixed = f"{options.share:g} of the weights come from {known_as(options.average)}"
        card["averaged"] = ", then ".join(filter(None, (card.get("averaged"), mixed)))
    given = settings_of(Mend.config_class, options) | {"gate_shift": options.gate_shift}
    if more := {name: value for name, value in given.items() if value is not None}:
        if not isinstance(editor, Mend):
            raise EditorError(f"{_flags(more)}: mend has such settings, {editor.name} has not.")
        if "gate_shift" in more:
            card["gate_shift"] = editor.shift_gate(more.pop("gate_shift"))
        editor = editor.changed(**more)
    if (made := _identity(editor)) != before:
        card.pop("evaluation", None)
    if options.evaluation:
        card["evaluation"] = _figures(options.evaluation, options.editor, made)
    editor.card = card
    print(f"editor in {editor.save_pretrained(options.out, half=True)}")


@torch.no_grad()
def _average(editor: TrainableEditor, other: TrainableEditor, share: float) -> None:
    """Move an editor's parameters towards another's; running statistics stay its own."""
    if not 0 <= share <= 1:
        raise EditorError(f"--share is the other editor's part, 0 to 1; got {share}.")
    if editor.settings() != other.settings():
        raise EditorError(
            f"Only editors of the same settings can be averaged: {editor.settings()} and "
            f"{other.settings()} differ."
        )
    theirs = dict(other.named_parameters())
    for name, parameter in editor.named_parameters():
        parameter.lerp_(theirs[name], share)


def _figures(file: Path, editor: str, packed: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate --json` wrote of one editor, by whatever path it was named.

    Args:
        file: What it wrote.
        editor: Its name there.
        packed: The identity of the editor that is to have these figures.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        named = {Path(name).resolve(): figures for name, figures in results["editors"].items()}
        figures = named[Path(editor).resolve()]
        if not packed.items() <= figures.items():
            raise EditorError(
                f"{file} holds figures of {editor} with other weights or settings than are packed: "
                f"pack it without --evaluation, measure what was packed, and pack that with its "
                f"figures."
            )
        return {
            "settings": results["settings"] | {"model": known_as(results["settings"]["model"])},
            "figures": {k: v for k, v in figures.items() if k != "settings"},
        }
    except (OSError, *MALFORMED) as error:
        raise EditorError(
            f"{file} holds no figures of {editor} ({error!r}): write it with "
            f"python -m workbench evaluate --editors {editor} --json {file} ..."
        ) from None


def push(options: argparse.Namespace) -> None:
    """Put a trained editor into a repository of the hub, and print its address."""
    print(push_editor(options.folder, options.name, private=options.private))


def export(options: argparse.Namespace) -> None:
    """Write a saved session's live edits as one PEFT adapter folder."""
    bench = Workbench.load(options.session, device=options.device)
    print(f"PEFT adapter in {bench.to_peft(options.to_peft)}")


def settings_of(config: type, options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a settings class that were given on the command line."""
    given = vars(options)
    return {f.name: given[f.name] for f in fields(config) if f.name in given}


def _open(options: argparse.Namespace) -> LanguageModel:
    held: dict[str, Any] = {**_held(options), "device": parallel.join(options.device)}
    if options.device_map and parallel.count() > 1:
        raise ModelError(
            f"--device-map spreads one model over all cards: give it to one process, not to "
            f"{parallel.count()}, of which each opens the model on a card of its own."
        )
    return open_model(options.model, progress=parallel.leads(), **held)


def _held(options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the weights are to be held, and whether prompts are turns of a chat."""
    names = ("device", "dtype", "quantize", "device_map", "chat")
    return {name: value for name, value in vars(options).items() if name in names}


def _say(text: str) -> None:
    if parallel.leads():
        print(text)


def _read(spec: str, split: str | None, options: argparse.Namespace, lm: LanguageModel) -> Dataset:
    found = read(spec, split=split, limit=options.limit, skip_bad=options.skip_bad)
    for record in found.skipped[:10] if options.skip_bad else ():
        _say(f"skipped {record}")
    if options.skip_bad and found.skipped:
        _say(f"{spec}: skipped {len(found.skipped)} records, kept {len(found)}")
    if options.sample and spec.startswith("passages:"):
        return Dataset(tuple(continuations(lm, found)), found.skipped)
    return found


def _file_name(spec: str) -> str:
    """A data set as others know it: its format and its file's name or hub id, not where it lay."""
    name, colon, path = spec.partition(":")
    return name + colon + os.pathsep.join(map(known_as, path.split(os.pathsep)))


def _device_name(lm: LanguageModel) -> str:
    if lm.device.type == "cuda":
        name = torch.cuda.get_device_name(lm.device)
    else:
        name = f"{lm.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return name if parallel.count() == 1 else f"{parallel.count()} x {name}"


def _print_table(editors: dict[str, dict[str, Any]]) -> None:
    hidden = {"settings", "weights", "confidence_95", "seconds", "device", "n"}
    names = list(dict.fromkeys(k for scores in editors.values() for k in scores if k not in hidden))
    width = max(map(len, names))
    columns: Sequence[str] = [name.rsplit("/", 1)[-1][:16] for name in editors]
    print(" " * width, *(f"{column:>16}" for column in columns))
    for name in names:
        cells = []
        for scores in editors.values():
            half = scores["confidence_95"].get(name)
            cells.append(f"{scores[name]:.3f} ±{half:.3f}" if name in scores else "-")
        print(f"{name:<{width}}", *(f"{cell:>16}" for cell in cells))
    print(f"{'n':<{width}}", *(f"{scores['n']:>16}" for scores in editors.values()))
