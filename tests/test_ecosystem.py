"""Other tools run on the edited model: pipelines, transformers' generate, lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import config as datasets_config
from families import language_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, pipeline

from workbench import Workbench
from workbench.editors import FineTune, FineTuneConfig

torch.set_num_threads(1)


@pytest.fixture
def wb() -> Workbench:
    lm = language_model("llama")
    return Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[1, 2, 3], lr=3e-3)))


def test_a_pipeline_writes_what_the_workbench_does(wb: Workbench) -> None:
    base = wb.generate("ab", max_new_tokens=5)
    wb.edit("ab", "Lyon")
    greedy = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}

    def written() -> list[str]:
        return [answer["generated_text"] for answer in pipe("ab", **greedy)]

    with wb.applied() as model:
        parts: dict[str, Any] = {"model": model, "tokenizer": wb.lm.tokenizer}
        pipe: Any = pipeline("text-generation", **parts)
        assert written() == wb.generate("ab", max_new_tokens=5) == [" Lyon"]
    assert written() == base != [" Lyon"]
    with wb.applied():
        assert written() == [" Lyon"]


def test_generate_takes_the_options_of_transformers(wb: Workbench) -> None:
    wb.edit("ab", "Lyon")
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    texts = wb.generate(["ab", "cd"], max_new_tokens=5, **beams)
    assert (len(texts), texts[0]) == (4, " Lyon")
    config = GenerationConfig(**beams)
    assert wb.generate(["ab", "cd"], max_new_tokens=5, generation_config=config) == texts
    assert config.max_new_tokens is None  # the caller's own is left alone
    scored: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    assert wb.generate(["ab", "cd"], max_new_tokens=5, **beams, **scored) == texts
    stop: dict[str, Any] = {"stop_strings": "y", "tokenizer": wb.lm.tokenizer}
    assert wb.generate("ab", max_new_tokens=5, **stop) == [" Ly"]
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn += wb.generate("zz", max_new_tokens=8, do_sample=True, temperature=3.0)
    assert drawn[0] == drawn[1] != wb.generate("zz", max_new_tokens=8)[0]


def test_the_harness_measures_the_edited_model(
    wb: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # It would have pip list what is installed, which takes longer than all else.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    prompts, choices = [f"{sign}{sign} is" for sign in "abcd"], ["xy", "Q!"]

    def preferred() -> list[int]:
        chances = [
            [row.edited_probability for row in wb.compare(prompts, target=choice).rows]
            for choice in choices
        ]
        return [int(first < second) for first, second in zip(*chances, strict=True)]

    answers = [1 - choice for choice in preferred()]  # what the base model would not choose
    file = tmp_path / "questions.jsonl"
    rows = zip(prompts, answers, strict=True)
    file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": choices,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }

    def accuracy() -> float:
        with wb.applied() as model:
            found: Any = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=wb.lm.tokenizer),  # type: ignore[arg-type]
                tasks=[dict(task)],
                task_manager=TaskManager(include_defaults=False),  # which are thousands of files
                bootstrap_iters=0,
            )
        return found["results"]["tiny"]["acc,none"]

    checksum = wb.lm.checksum()
    assert accuracy() == 0
    wb.edit(prompts[0], choices[answers[0]])
    right = [said == wanted for said, wanted in zip(preferred(), answers, strict=True)]
    assert right[0]
    assert accuracy() == sum(right) / len(right)
    wb.undo()
    assert accuracy() == 0
    assert wb.lm.checksum() == checksum
