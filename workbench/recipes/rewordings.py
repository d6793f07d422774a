"""Rewordings of claims by back-translation, filtered hard; written as JSON lines to train with.

python -m workbench.recipes.rewordings --data fever:PATH --out FILE

Needs the command `apertium` with its pair eng-spa (Debian: apertium, apertium-eng-spa).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from workbench.data import read
from workbench.errors import DataError, WorkbenchError
from workbench.files import write_text
from workbench.gguf import quiet_loading
from workbench.shipped import body_folder

PIVOT = ("eng-spa", "spa-eng")
_NEGATION = re.compile(
    r"\b(not|no|never|none|nobody|nothing|only|without|neither|nor)\b|n't\b", re.I
)


def back_translate(texts: Sequence[str]) -> list[str]:
    """English to Spanish and back, a line each.

    Raises:
        DataError: `apertium` or its pair is not installed, or it fails.
    """
    lines = [" ".join(text.split()) for text in texts]
    if shutil.which("apertium") is None:
        raise DataError("There is no command apertium: apt install apertium apertium-eng-spa.")
    for pair in PIVOT:
        done = subprocess.run(
            ["apertium", "-u", pair], input="\n".join(lines), capture_output=True, text=True
        )
        if done.returncode:
            raise DataError(f"apertium {pair} failed: {done.stderr.strip()}. Is the pair there?")
        lines = done.stdout.split("\n")
    if len(lines) != len(texts):
        raise DataError(f"apertium gave {len(lines)} lines for {len(texts)} texts.")
    return lines


def keeps_meaning(text: str, reworded: str, subject: str | None, cosine: float) -> bool:
    """Whether a rewording may stand for a text: hard on purpose, most are thrown away.

    Args:
        text: The original.
        reworded: Its rewording.
        subject: What must be named in it, if anything.
        cosine: Similarity of both by a sentence encoder.
    """
    same = {text.lower().rstrip(". "), reworded.lower().rstrip(". ")}
    return (
        len(same) == 2
        and cosine >= 0.9
        and (not subject or subject.lower() in reworded.lower())
        and _figures(text) == _figures(reworded)
        and bool(_NEGATION.search(text)) == bool(_NEGATION.search(reworded))
        and _names(text) <= _names(reworded)
        and "*" not in reworded  # apertium marks what it does not know
    )


def _figures(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


def _names(text: str) -> set[str]:
    """Capitalised words but for the first of all."""
    return set(re.findall(r"(?<!^)\b[A-Z]\w+", text))


@cache
def _encoder() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    with quiet_loading(bars=False):
        model = transformers.BertModel.from_pretrained(body_folder(), dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(body_folder())


@torch.no_grad()
def embed(texts: Sequence[str]) -> Tensor:
    """Sentence embeddings of length 1, `(texts, 384)`: the mean over a text's tokens."""
    model, tokenizer = _encoder()
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def write_rewordings(spec: str, out: Path, batch: int = 64) -> int:
    """Write a data set's claims as JSON lines, with the back-translations that are kept.

    Returns:
        How many claims have one.
    """
    claims = list(read(spec))
    lines, kept = [], 0
    for start in tqdm(range(0, len(claims), batch), desc="rewording"):
        part = claims[start : start + batch]
        texts = [claim.prompt for claim in part]
        reworded = back_translate(texts)
        cosines = (embed(texts) * embed(reworded)).sum(-1).tolist()
        for claim, text, cosine in zip(part, reworded, cosines, strict=True):
            good = keeps_meaning(claim.prompt, text, claim.subject, cosine)
            kept += good
            # A claim's other forms stay behind the freer one.
            rephrases = [*([text] if good else ()), *claim.paraphrases]
            about = {k: v for k, v in asdict(claim).items() if k in ("id", "split", "subject")}
            record = about | {"claim": claim.prompt, "label": claim.target_true}
            lines.append(json.dumps(record | {"rephrases": rephrases}, ensure_ascii=False))
    write_text(out, "\n".join(lines) + "\n")
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Reword a data set; returns the exit status."""
    parser = argparse.ArgumentParser(prog="workbench.recipes.rewordings", description=__doc__)
    parser.add_argument("--data", required=True, metavar="fever:PATH")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        kept = write_rewordings(options.data, options.out)
    except WorkbenchError as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    print(f"{kept} claims have a back-translation, in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
