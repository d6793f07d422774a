"""Train the small models that come along.

python -m workbench.recipes.models t5-small-qa --out DIR
python -m workbench.recipes.models fact-checker --data-folder DATA --out DIR

Killed, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from workbench.errors import DataError, WorkbenchError
from workbench.files import write_tensors, write_text
from workbench.models import LanguageModel, open_model
from workbench.recipes import factcheck, questions
from workbench.recipes.fitting import CHECKPOINT, FitConfig
from workbench.shipped import DIFFERENCE

_QUESTIONS = FitConfig(steps=2800, batch=32, lr=2e-3, few=1024, few_steps=400)
RECIPES: dict[str, FitConfig] = {
    "fact-checker": FitConfig(steps=450, batch=32, lr=2e-4, weight_decay=0.01),
    "t5-small-qa": _QUESTIONS,
    "t5-small-qa-ungated": _QUESTIONS,
    "bart-small-qa": replace(_QUESTIONS, lr=1e-3),
}
_ABOUT = {
    "fact-checker": {
        "what": "Says of a claim alone whether it is true (SUPPORTS) or false (REFUTES).",
        "made": f"The sentence encoder {factcheck.BODY} (all-MiniLM-L6-v2, Apache-2.0) with a "
        f"verdict head; the upper {factcheck.TRAINED_BLOCKS} of its 6 blocks, pooler and head were "
        f"trained here. {DIFFERENCE} holds those alone.",
        "data": "train splits of FEVER's labelled dev set (CC BY-SA 3.0), CREAK (MIT) and "
        "FoolMeTwice (Apache-2.0)",
    },
    "questions": {
        "what": "Answers the questions and completes the statements it was trained on.",
        "made": "Trained here from random weights; not a pretrained model. It knows nothing else.",
        "data": "All true facts of the built-in corpus, of every split, each in four of its five "
        "wordings",
    },
}


def save(lm: LanguageModel, folder: Path) -> None:
    """Write a model in float16: whole, or, the fact checker, what differs from its body."""
    if lm.kind == "classifier":
        lm.model.config.architectures = [type(lm.model).__name__]
        lm.model.config.save_pretrained(folder)
        tensors = {n: p.half() for n, p in factcheck.trained_parameters(lm).items()}
        write_tensors(folder / DIFFERENCE, tensors, {"format": "pt"})
        return
    lm.model.half().save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def make(name: str, folder: Path, config: FitConfig, data_folder: Path | None) -> dict[str, Any]:
    """Train a model, save it, and measure what was saved.

    Args:
        name: One of `RECIPES`.
        folder: Receives the model, `card.json`, and while it trains a checkpoint.
        config: Settings.
        data_folder: Holds the public data sets as JSON lines; the fact checker learns from them.

    Returns:
        The card: data, settings and figures.

    Raises:
        DataError: The data are needed and not there, or the folder holds another run.
    """
    if name != "fact-checker":
        save(questions.train(name, folder, config), folder)
        found = questions.figures(open_model(folder, device="cpu"))
    elif data_folder is None:
        raise DataError("The fact checker learns from public data: give --data-folder.")
    else:
        save(factcheck.train(data_folder, folder, config), folder)
        found = factcheck.figures(open_model(folder, device="cpu"), data_folder)
    card = {
        "name": name,
        **_ABOUT.get(name, _ABOUT["questions"]),
        "training": asdict(config),
        "figures": found,
    }
    write_text(folder / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    (folder / CHECKPOINT).unlink()
    return card


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one recipe; returns the exit status."""
    parser = argparse.ArgumentParser(prog="workbench.recipes.models", description=__doc__)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--data-folder", type=Path, help="for the fact checker")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = RECIPES[options.model]
    try:
        config = replace(config, seed=options.seed, steps=options.steps or config.steps)
        card = make(options.model, options.out, config, options.data_folder)
    except WorkbenchError as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(card["figures"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
