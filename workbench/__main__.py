"""The command line: edit, tokens, train, scope, evaluate, pack, push, export."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: the user can mend it, the message says how)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        # Imports wait until here, so that --help costs little more than torch.
        from workbench import commands

        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            return getattr(commands, options.command)(options) or 0
    except WorkbenchError as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("workbench: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workbench", description="Edit language models with MEND, look inside, undo."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    edit = commands.add_parser("edit", help="make one edit and show before and after")
    edit.add_argument("prompt", help='e.g. "The capital of France is"')
    edit.add_argument("target", help='what the model should say next, e.g. "Lyon"')
    edit.add_argument("--subject", help="what the prompt is about, as it stands there (guessed)")
    edit.add_argument("--compare", action="append", default=[], metavar="PROMPT")
    edit.add_argument("--save", type=Path, metavar="DIR", help="save the session")
    edit.add_argument("--max-new-tokens", type=int, default=8)
    _model(edit, editor=True)

    tokens = commands.add_parser("tokens", help="show which tokens of an edit are its target")
    tokens.add_argument("prompt")
    tokens.add_argument("target")
    _model(tokens, editor=False)

    train = commands.add_parser("train", help="meta-train an editor")
    train.add_argument("--editor", default="mend", choices=["mend", "ke", "enn"])
    train.add_argument("--data", action="append", required=True, metavar="FORMAT[:PATH]")
    train.add_argument("--split", default="train", help="split to train on ('all': whole files)")
    train.add_argument(
        "--validation-data", metavar="FORMAT[:PATH]", help="default: dev split of --data"
    )
    train.add_argument(
        "--unrelated", metavar="passages:PATH", help="unrelated texts (default: built in)"
    )
    train.add_argument("--limit", type=int, help="most examples of each --data")
    _sample(train)
    train.add_argument("--out", type=Path, required=True, metavar="DIR")
    train.add_argument(
        "--start",
        metavar="DIR",
        help="go on from this trained editor (a folder or hub id), with a new run's settings",
    )
    train.add_argument("--resume", action="store_true")
    train.add_argument(
        "--cache-folder",
        type=Path,
        metavar="DIR",
        help="keep what is constant in training on disk, beyond --cache-gb and for later runs",
    )
    train.add_argument("--tensorboard", type=Path, metavar="DIR", help="log the losses there too")
    train.add_argument("--skip-bad", action="store_true", help="list malformed records and go on")
    _model(train, editor=False)
    _settings(train)

    scope = commands.add_parser("scope", help="confine a MEND editor's edits to their subjects")
    scope.add_argument("--editor", required=True, metavar="DIR", help="its folder, hub id or name")
    scope.add_argument("--data", action="append", required=True, metavar="FORMAT[:PATH]")
    scope.add_argument("--split", default="train", help="split to learn from ('all': whole files)")
    scope.add_argument(
        "--examples", type=int, default=2500, dest="limit", help="most of each --data (2500)"
    )
    scope.add_argument(
        "--rank", type=int, default=128, dest="scope", help="of the metric of subjects (128)"
    )
    enough = "of an edit's own match that is enough (0.5)"
    scope.add_argument("--share", type=float, default=0.5, dest="scope_share", help=enough)
    asked = "of the metric of what is asked (128); 0: edits act whatever is asked of a subject"
    scope.add_argument("--relation-rank", type=int, default=128, dest="scope_relation", help=asked)
    dest = "scope_relation_share"
    scope.add_argument("--relation-share", type=float, default=0.5, dest=dest, help="as --share")
    scope.add_argument("--steps", type=int, default=1500)
    scope.add_argument("--seed", type=int, default=0)
    scope.add_argument("--skip-bad", action="store_true", help="list malformed records and go on")
    scope.add_argument("--out", type=Path, required=True, metavar="DIR")
    scope.set_defaults(sample=False)
    _model(scope, editor=False)

    evaluate = commands.add_parser("evaluate", help="measure editors on many edits")
    evaluate.add_argument("--data", required=True, metavar="FORMAT[:PATH]")
    evaluate.add_argument("--editors", default="mend,ft", help="names, folders, hub ids: by commas")
    evaluate.add_argument("--split", help="only this split (default: all in the file)")
    evaluate.add_argument("--limit", type=int)
    _sample(evaluate)
    evaluate.add_argument(
        "--known", action="store_true", help="edit only where the model gives the true answer"
    )
    evaluate.add_argument("--generate", action="store_true", help="also score free-running text")
    evaluate.add_argument(
        "--crossed",
        type=int,
        default=0,
        help="prompts with another subject, and with another relation, of other examples (0)",
    )
    evaluate.add_argument("--at-once", type=int, default=1, help="edits live together (1)")
    evaluate.add_argument("--aggregation", default="sum", help="sum, ridge or sequence, of those")
    evaluate.add_argument("--damping", type=float, default=0.003, help="of ridge (0.003)")
    evaluate.add_argument("--json", type=Path, metavar="FILE")
    evaluate.add_argument(
        "--resume", action="store_true", help="keep what --json holds of unchanged editors"
    )
    evaluate.add_argument("--skip-bad", action="store_true")
    _model(evaluate, editor=False)

    pack = commands.add_parser("pack", help="write a trained editor for sharing")
    pack.add_argument("--editor", required=True, metavar="DIR", help="its folder, or its hub id")
    pack.add_argument("--average", metavar="DIR", help="mix in this editor's weights (or a hub id)")
    pack.add_argument("--share", type=float, default=0.5, help="of --average, 0 to 1 (0.5)")
    pack.add_argument("--rounds", type=int, help="most rounds of its edits, of MEND")
    pack.add_argument("--later-strength", type=float, help="of rounds after the first")
    pack.add_argument("--confidence", type=float, help="at which an edit needs no more rounds")
    pack.add_argument("--scope-share", type=float, help="of the match with an edit's own subject")
    pack.add_argument("--scope-relation-share", type=float, help="of that with its own prompt")
    pack.add_argument(
        "--gate-shift", type=float, metavar="LOGITS", help="added to its gate's shares; of MEND"
    )
    pack.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="JSON of evaluate on what is packed"
    )
    pack.add_argument("--out", type=Path, required=True, metavar="DIR")
    _model(pack, editor=False, prompts=False)

    push = commands.add_parser("push", help="put a trained editor on the hub, with a model card")
    push.add_argument("folder", type=Path, help="of the editor, as train or pack wrote it")
    push.add_argument("name", help="of the repository, OWNER/NAME; made if it is not there")
    push.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="of a repository that is made (default: as the account has it); refused if the one "
        "that is there is public",
    )

    export = commands.add_parser("export", help="write a saved session as a PEFT adapter")
    export.add_argument("--session", type=Path, required=True, metavar="DIR")
    export.add_argument("--to-peft", type=Path, required=True, metavar="DIR")
    export.add_argument("--device", default="auto")
    return parser


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample",
        action="store_true",
        help="of passages: edit to ten tokens that the model samples, as in the paper",
    )


def _model(parser: argparse.ArgumentParser, *, editor: bool, prompts: bool = True) -> None:
    parser.add_argument(
        "--model",
        help="hub id, folder, GGUF file, or one that comes along: bart-small-qa, fact-checker, "
        "t5-small-qa (default: the embedded SmolLM2)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--device-map",
        choices=["auto", "balanced", "balanced_low_0", "sequential"],
        help="spread the model over all cards, in place of --device",
    )
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16 (default: float32 on the CPU, else the checkpoint's own "
        "half precision or bfloat16)",
    )
    parser.add_argument("--quantize", choices=["8bit", "4bit"])
    if prompts:
        parser.add_argument(
            "--chat",
            action="store_true",
            help="prompts are a user's turns in a chat, read through the model's template",
        )
    if editor:
        parser.add_argument(
            "--editor",
            help="a trained editor's folder or hub id (OWNER/NAME, OWNER/NAME@REVISION), mend, "
            "mend-many, mend-linear, ft, ft_kl, rome or lora",
        )


def _settings(parser: argparse.ArgumentParser) -> None:
    """Flags for every field of the editors' and the training's settings."""
    from workbench.editors import trainable_editors
    from workbench.training import TrainingConfig

    editors = {name: fields(cls.config_class) for name, cls in trainable_editors().items()}
    common = set.intersection(*({field.name for field in own} for own in editors.values()))
    groups = {"settings of every editor": [f for f in editors["mend"] if f.name in common]}
    for name, own in editors.items():
        groups[f"settings of {name}"] = [field for field in own if field.name not in common]
    groups["settings of training"] = list(fields(TrainingConfig))
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for field in settings:
            flag = f"--{field.name.replace('_', '-')}"
            default = None if field.default is MISSING else field.default
            if isinstance(default, bool):
                group.add_argument(
                    flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS
                )
            elif field.name in ("blocks", "matrices"):
                group.add_argument(
                    flag,
                    type=_listed,
                    default=argparse.SUPPRESS,
                    metavar="A,B,C",
                    help=f"negative numbers count from the top: {flag}=-3,-2,-1"
                    if field.name == "blocks"
                    else "mlp, attention, all, or names such as down_proj",
                )
            else:
                group.add_argument(flag, type=type(default), default=argparse.SUPPRESS)


def _listed(text: str) -> Any:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if parts in (["mlp"], ["attention"], ["all"]):
        return parts[0]
    return [int(part) if part.lstrip("-").isdigit() else part for part in parts]


if __name__ == "__main__":
    sys.exit(main())
