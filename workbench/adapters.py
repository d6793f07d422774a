"""Adapters: a low-rank update is a LoRA adapter, written and read as a folder that PEFT knows."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from workbench.cards import code, line
from workbench.checks import path_of
from workbench.errors import EditError, FileError
from workbench.files import read_tensors, write_tensors, write_text, writing
from workbench.layers import DENSE, EditableLayer
from workbench.models import LanguageModel
from workbench.updates import LayerUpdate, Update

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# A SEQ_CLS adapter must hold the weights of the classification head, which no edit changes.
_TASK = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": None}
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What PEFT's config may say of an adapter that is W + scale * B A and nothing else. Whatever
# else is switched on there, today's variants or tomorrow's, changes the arithmetic.
_PLAIN = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    }
)
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights too.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def export_peft(
    update: Update, lm: LanguageModel, folder: str | Path, titles: Sequence[str] = ()
) -> Path:
    """Write an update as a PEFT LoRA adapter: `PeftModel.from_pretrained(model, folder)` loads it.

    Scales are folded into the factors, so that `lora_alpha / r` is 1 in every layer; layers of
    rank 0 are left out. In most mixture-of-experts models PEFT 0.21 takes dense and shared MLPs
    for the routed experts and loads an adapter without them (huggingface/peft issue 3711), warning
    of missing keys; `import_peft` reads them.

    Args:
        update: An unbatched change of the model's editable layers.
        lm: The model it was made for.
        folder: Made if it is not there; an adapter in it is replaced.
        titles: What the edits say, for the model card (`README.md`): shown there as texts.

    Returns:
        The folder.

    Raises:
        EditError: The update is batched, gated or empty, or does not fit the model.
        FileError: The folder cannot be written, or the disk is full.
    """
    folder, layers = path_of(folder, FileError), _editable(lm)
    if update.gated:
        raise EditError(
            "An edit with a gate or a scope acts only where a layer's input matches its keys, and "
            "a LoRA adapter acts everywhere: it cannot carry the edit. Save the session instead, "
            "or edit with an editor without ('mend-linear' for the embedded model, or 'ft')."
        )
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in update.items():
        if layer.A.dim() == 3:
            raise EditError(
                f"The update holds a change for each of {layer.A.shape[0]} sequences; an adapter "
                "holds one. Export the update of one sequence."
            )
        folded = layer.folded()
        A, B = folded.A, folded.B.mT
        _check_shapes(name, A, B, layer.rank, layers, lm)
        if layer.rank:
            ranks[name] = layer.rank
            # Copies, because the layers of an update may share a factor and the format may not.
            for key, factor in (("A", A), ("B", B)):
                copy = factor.detach().clone(memory_format=torch.contiguous_format)
                tensors[f"base_model.model.{name}.lora_{key}.weight"] = copy
    if not ranks:
        raise EditError("The update changes nothing: there is no adapter to write. Edit first.")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "task_type": _TASK[lm.kind],
        "base_model_name_or_path": lm.source,
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layers[name].transposed for name in ranks),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=".partial-", dir=folder))
    try:
        write_tensors(made / WEIGHTS, tensors, {"format": "pt"})
        write_text(made / "README.md", _card(update, ranks, lm, titles))
        write_text(made / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        # Without its config a folder is no adapter: none pairs these weights with an older config.
        with writing(folder / CONFIG):
            (folder / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, "README.md", CONFIG):
            with writing(folder / name):
                os.replace(made / name, folder / name)
    finally:
        rmtree(made, ignore_errors=True)
    return folder


def import_peft(folder: str | Path, lm: LanguageModel) -> Update:
    """Read a PEFT LoRA adapter folder, ours or one that PEFT trained and saved, as an update.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        lm: The model to be edited; the adapter's layers must be among its editable layers.

    Returns:
        An update in float32 (float64 where the file has it), on the devices of its layers, with
        `lora_alpha / r` (rsLoRA: `lora_alpha / sqrt(r)`) as its scales.

    Raises:
        EditError: A file is missing or damaged; the adapter is more than a low-rank change of
            linear layers; or it does not fit the model.
    """
    folder, layers = path_of(folder, EditError), _editable(lm)
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise EditError(
            f"{folder} holds its weights only as pickle (adapter_model.bin), which can run code "
            "when read. Where you trust it, load it with PEFT, save it again with "
            "save_pretrained(folder), which writes safetensors, and import that."
        )
    tensors, _ = read_tensors(folder / WEIGHTS, EditError)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dtype not in DENSE:
            raise EditError(
                f"{folder / WEIGHTS} holds {key} ({tensor.dtype}), and an update holds only "
                "lora_A.weight and lora_B.weight of linear layers, in floating point. Train plain "
                "LoRA, or merge the adapter into its model and open that."
            )
        factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise EditError(f"{folder / WEIGHTS} holds no layers. Save the adapter again.")
    read = {name: _layer(name, pair, config, layers, lm) for name, pair in factors.items()}
    update = Update({name: read[name] for name in layers if name in read})
    if not update.is_finite():
        raise EditError(
            f"{folder / WEIGHTS} holds numbers that are not finite. Train or save it again."
        )
    return update


def _layer(
    name: str,
    factors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layers: Mapping[str, EditableLayer],
    lm: LanguageModel,
) -> LayerUpdate:
    if len(factors) == 1:
        raise EditError(
            f"The adapter has only lora_{min(factors)} of layer {name}: it needs lora_A and "
            "lora_B. Copy or save the adapter again."
        )
    try:
        rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scale = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise EditError(
            f"{CONFIG} gives no scale for layer {name} ({error!r}): it needs a positive r, "
            "lora_alpha, and rank_pattern and alpha_pattern of the same form, where there are any."
        ) from None
    A, B = factors["A"], factors["B"]
    _check_shapes(name, A, B, rank, layers, lm)
    weight = next(layers[name].module.parameters())
    device = lm.device if weight.is_meta else weight.device
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return LayerUpdate(A.to(device, dtype), B.mT.contiguous().to(device, dtype), scale)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The first pattern that matches the name or the end of it from a dot on: PEFT's rule."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _editable(lm: LanguageModel) -> dict[str, EditableLayer]:
    blocks = {stack.name: range(len(stack.blocks)) for stack in lm.stacks}
    return {layer.name: layer for layer in lm.layers(blocks, "all")}


def _check_shapes(
    name: str,
    A: Tensor,
    B: Tensor,
    rank: int,
    layers: Mapping[str, EditableLayer],
    lm: LanguageModel,
) -> None:
    """Refuse factors that are not (rank, in) and (out, rank) of an editable layer."""
    if name not in layers:
        raise EditError(
            f"{name} is no editable layer of {lm.source}: those are linear layers inside the "
            f"blocks, such as {next(iter(layers))}. Open the model that the edit was made for."
        )
    layer = layers[name]
    expected = (rank, layer.in_features), (layer.out_features, rank)
    given = tuple(A.shape), tuple(B.shape)
    if given != expected:
        raise EditError(
            f"Layer {name} of {lm.source} takes lora_A and lora_B of shapes {expected[0]} and "
            f"{expected[1]} (rank {rank}); got {given[0]} and {given[1]}. Open the model that the "
            "edit was made for, or save the adapter again if it is damaged."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config, once it is sure that it describes a plain LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise EditError(
            f"There is no file {path}: give a folder with {CONFIG} and {WEIGHTS}, as export_peft "
            "and PEFT's save_pretrained write it; download an adapter of the hub first."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise EditError(
            f"{path} is damaged or no JSON file ({error}). Copy or save it again."
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise EditError(
            f'{path} has peft_type {kind!r}, and only "LORA" adapters are low-rank updates. '
            "Merge the adapter into its model and open that."
        )
    extra = [f"{key}={value!r}" for key, value in config.items() if value and key not in _PLAIN]
    extra = [setting for setting in extra if setting != "bias='none'"]
    start = config.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        extra.append(f"init_lora_weights={start!r} (which changes the base weights)")
    if extra:
        raise EditError(
            f"A low-rank update cannot carry what {path} asks for: {', '.join(extra)}. Train "
            "plain LoRA, or merge the adapter into its model and open that."
        )
    return config


def _card(
    update: Update, ranks: Mapping[str, int], lm: LanguageModel, titles: Sequence[str]
) -> str:
    said = "\n".join(f"- {code(title)}" for title in titles)
    rows = "\n".join(f"| {code(n)} | {r} | {update[n].norm():.4g} |" for n, r in ranks.items())
    return f"""---
base_model: {json.dumps(line(lm.source), ensure_ascii=False)}
library_name: peft
tags: [lora, model-editing]
---

# An edit of {code(lm.source)}

{said or "A low-rank change of the layers below."}

| Layer | Rank | Norm of the change |
|---|---|---|
{rows}

Load it over the base model, loaded as `model`:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this-folder")
```
"""
