"""Shapes with random weights, estimates of what they take, the figure of growth: on tiny ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.benchmarks.estimate import Estimate, estimate
from tests.benchmarks.growth import AXES, figure, growth
from tests.benchmarks.scale import check, scale
from tests.benchmarks.setting import facts, gather_statistics, texts_of
from tests.benchmarks.shapes import SHAPES, filled, outline, random_model, word_tokenizer
from workbench import LanguageModel, Mend, MendConfig, Workbench
from workbench.training import TrainingConfig

CPU = torch.device("cpu")
CONFIGS = {
    "llama": SHAPES["tiny"],
    "t5": lambda: small("t5-xxl", d_model=64, d_ff=128, d_kv=16, num_heads=4),
    "gptj": lambda: small("gpt-j-6b", n_embd=64, n_head=4, rotary_dim=8),
}
LAYERS = {"t5-xxl": ("num_layers", "num_decoder_layers"), "gpt-j-6b": ("n_layer",)}


def small(shape: str, **settings: int) -> hf.PretrainedConfig:
    """A shape of fewer, narrower layers."""
    config = SHAPES[shape]()
    for name, value in (settings | dict.fromkeys(LAYERS[shape], 3)).items():
        setattr(config, name, value)
    return config


def count(shape: str) -> int:
    return sum(p.numel() for p in outline(SHAPES[shape](), "bf16").parameters())


def test_the_large_shapes_have_their_names_sizes():
    assert count("1b") == 1_235_814_400
    assert count("gpt-j-6b") == 6_050_882_784
    assert count("t5-xxl") == pytest.approx(11.1e9, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "float32", "4bit"])
@pytest.mark.parametrize("family", CONFIGS)
def test_an_outline_holds_nothing_and_is_estimated_as_it_is_filled(family: str, precision: str):
    if precision == "4bit":
        pytest.importorskip("bitsandbytes", reason="install the extra 'quant' to run this")
    examples, config = facts(4), CONFIGS[family]()
    tokenizer = word_tokenizer(examples, 4096)
    lm = LanguageModel.wrap(outline(config, precision), tokenizer)
    assert all(parameter.is_meta for parameter in lm.model.parameters())
    training = TrainingConfig(batch=2)
    needed = estimate(lm, MendConfig(rank=8), texts_of(lm, examples, training), training, CPU)
    made = LanguageModel.wrap(filled(lm.model, precision, CPU), tokenizer)
    assert made.precision == {"bf16": "bfloat16"}.get(precision, precision)
    parameters: list[Any] = list(made.model.parameters())
    held = sum(p.numel() * p.itemsize for p in parameters)
    scales = sum(p.quant_state.absmax.numel() * 4 for p in parameters if hasattr(p, "quant_state"))
    assert needed.weights == pytest.approx(held + scales, rel=1e-3)
    editor = Mend(made, MendConfig(rank=8))
    numbers = [*editor.parameters(), *editor.buffers()]
    assert needed.editor == pytest.approx(4 * sum(n.numel() for n in numbers), rel=1e-2)
    bench = Workbench(made, gather_statistics(editor, texts_of(made, examples, training)))
    assert bench.edit(examples[0].prompt, examples[0].target).update.is_finite()


@pytest.mark.parametrize("shape", ["gpt-j-6b", "t5-xxl"])
@pytest.mark.parametrize(("precision", "gib"), [("4bit", 24), ("bf16", 48)])
def test_ten_billion_parameters_are_estimated_to_fit_one_card(shape: str, precision: str, gib: int):
    if precision == "4bit":
        pytest.importorskip("bitsandbytes", reason="install the extra 'quant' to run this")
    examples, config, training = facts(64), SHAPES[shape](), TrainingConfig(batch=16)
    tokenizer = word_tokenizer(examples, config.get_text_config().vocab_size)
    lm = LanguageModel.wrap(outline(config, precision), tokenizer)
    edits = texts_of(lm, examples, training)
    needed = estimate(lm, MendConfig(rank=1920), edits, training, torch.device("cuda"))
    assert needed.weights < needed.editing < needed.training < gib * 2**30


def test_random_weights_are_tied_as_the_shape_says():
    lm = random_model(SHAPES["tiny"](), "float32", CPU, word_tokenizer(facts(2), 4096))
    head: Any = lm.model.get_output_embeddings()
    assert head.weight is lm.model.get_input_embeddings().get_parameter("weight")


def test_a_shape_is_measured_and_compared_with_its_estimate(capsys: pytest.CaptureFixture[str]):
    found = scale("tiny", "float32", CPU, MendConfig(rank=4), batch=2, rounds=1)
    assert "tiny in float32 needs about" in capsys.readouterr().out
    assert found["scale"]["examples_per_second"]["median"] > 0
    assert found["peaks"]["training"]["peak_mib"] > 0
    assert set(found["off"]) == {"editing", "training"}
    assert found["machine"]["device"]


def test_what_does_not_fit_is_not_begun():
    with pytest.raises(SystemExit, match="not enough memory"):
        check("huge", Estimate(2**60, 0, 0, 0, 0, 0), CPU)


def test_growth_is_measured_along_an_axis_and_drawn():
    found = growth("live edits", (1, 2), CPU, rounds=1)
    assert all(set(points) == {1, 2} for points in found.values())
    assert len(found) == 5
    drawn: Any = figure({"live edits": found, "width": found})
    assert len(drawn.data) == 10
    assert [trace.showlegend for trace in drawn.data] == [True] * 5 + [False] * 5
    assert set(AXES) == {"width", "depth", "batch", "rank", "live edits"}
