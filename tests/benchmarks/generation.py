"""Generation with live edits, against PEFT's LoRA layers that apply the same updates."""

from __future__ import annotations

import copy
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.setting import PROMPT, Setting
from tests.benchmarks.timing import Action, Figures, Makers, in_turn, made
from workbench import LanguageModel, Workbench
from workbench.compare import generate_texts


def makers(setting: Setting) -> Makers:
    """`edits_N`: under N live edits; `peft_N`: under one LoRA adapter that holds them all."""
    length: dict[str, Any] = {"max_new_tokens": setting.tokens, "min_new_tokens": setting.tokens}

    @cache
    def edited(count: int) -> Workbench:
        return _edited(setting, count)

    def ours(count: int) -> Action:
        bench = edited(count)
        return lambda: bench.generate(PROMPT, **length)

    def peft(count: int) -> Action:
        lm = _with_adapter(edited(count))
        return lambda: generate_texts(lm, [PROMPT], **length)

    return {
        **{f"edits_{count}": partial(ours, count) for count in setting.live},
        **{f"peft_{count}": partial(peft, count) for count in setting.live if count},
    }


def generation(setting: Setting, rounds: int) -> Figures:
    """A continuation under more and more edits, of both kinds, and whether both say the same."""
    rivals = made(makers(setting))
    times = in_turn(setting.device, rounds, rivals)
    edited = [count for count in setting.live if count]
    same = [rivals[f"edits_{count}"]() == rivals[f"peft_{count}"]() for count in edited]
    return {
        "ms": times.milliseconds(),
        "tokens": setting.tokens,
        **{
            f"{kind}_{count}_over_edits_0": times.ratio(f"{kind}_{count}", "edits_0")
            for count in edited
            for kind in ("edits", "peft")
        },
        **{f"edits_{n}_over_peft_{n}": times.ratio(f"edits_{n}", f"peft_{n}") for n in edited},
        "same_texts": sum(same) / len(same),
    }


def _edited(setting: Setting, count: int) -> Workbench:
    bench = setting.bench(setting.linear)
    for example in islice(cycle(setting.examples), count):
        bench.edit(example.prompt, example.target)
    return bench


def _with_adapter(bench: Workbench) -> LanguageModel:
    """The model with PEFT's layers in it; the weights are shared, not copied."""
    from peft import PeftModel

    lm = bench.lm
    shared = (*lm.model.parameters(), *lm.model.buffers())
    twin = copy.deepcopy(lm.model, {id(tensor): tensor for tensor in shared})
    with TemporaryDirectory() as folder:
        bench.to_peft(Path(folder))
        adapted = PeftModel.from_pretrained(twin, folder)
    return LanguageModel.wrap(adapted.get_base_model(), lm.tokenizer, lm.source)  # type: ignore[arg-type]
