"""PEFT folders: what PEFT loads from ours, what we load from PEFT's, and what is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from families import batch_for, language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from references import assert_near
from runs import KINDS, editor_for, requests_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from workbench import Workbench
from workbench.adapters import export_peft, import_peft
from workbench.errors import EditError, FileError
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.updates import LayerUpdate, Update

# PEFT asks for a property that transformers 5 renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
torch.set_num_threads(1)

FAMILIES = ("gpt2", "llama", "t5", "bert", "gemma3", "phi3")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    """Shared by the tests in which PEFT does not touch the model."""
    return language_model("llama")


def random_update(
    lm: LanguageModel, scale: float | Tensor = -0.5, ranks: tuple[int, ...] = (2, 1, 3)
) -> Update:
    """Every second editable layer changed, so that one between two targets must stay untouched."""
    generator = torch.Generator().manual_seed(0)
    blocks = {stack.name: range(len(stack.blocks)) for stack in lm.stacks}
    layers = {}
    for index, layer in enumerate(lm.layers(blocks, "all")[::2]):
        rank = ranks[index % len(ranks)]
        A = torch.randn(rank, layer.in_features, generator=generator)
        B = torch.randn(rank, layer.out_features, generator=generator)
        layers[layer.name] = LayerUpdate(A, B, scale)
    return Update(layers)


def logits(model: nn.Module, lm: LanguageModel, update: Update | None = None) -> Tensor:
    with torch.no_grad(), overlay(model, update):
        return model(**batch_for(lm.model)).logits


def save_with_peft(folder: Path, family: str, config: PeftConfig) -> Tensor:
    """Save a random adapter of that config with PEFT; returns the logits PEFT gives with it."""
    lm = language_model(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = get_peft_model(lm.model, config).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3, mean=1.0 if "ia3" in name else 0.0)
    model.save_pretrained(str(folder))
    return logits(model, lm)


def assert_same(one: Update, other: Update) -> None:
    assert list(one) == list(other)
    for name in one:
        assert_close(one[name].dense(), other[name].dense(), atol=1e-6, rtol=1e-6)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# --- written here, read by PEFT


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_logits_of_the_overlay_attached_and_merged(
    family: str, tmp_path: Path
) -> None:
    lm = language_model(family)
    update = random_update(lm)
    base, edited = logits(lm.model, lm), logits(lm.model, lm, update)
    assert (edited - base).abs().max() > 1e-3
    assert export_peft(update, lm, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"

    loaded = PeftModel.from_pretrained(lm.model, str(tmp_path / "new" / "folder"))
    touched = [name for name, module in lm.model.named_modules() if hasattr(module, "lora_A")]
    assert touched == list(update)
    assert_near(logits(loaded, lm), edited)
    merged = cast(Any, loaded).merge_and_unload()
    assert_near(logits(merged, lm), edited)


@pytest.mark.parametrize("family", KINDS)
def test_edits_are_exported_as_they_act_off_or_at_their_strength(
    family: str, tmp_path: Path
) -> None:
    lm = language_model(family)
    wb = Workbench(lm, editor_for(family, lm, normalize=False, edit_lr=300.0).eval())
    one, two = (wb.edit(request.prompt, request.target) for request in requests_for(lm))
    three = wb.edit("The Sun is", one.requests[0].target)

    def acting() -> Tensor:
        with wb.applied() as model, torch.no_grad():
            return model(**batch_for(lm.model)).logits

    whole = acting()
    wb.strength(two.id, 0.5)
    halved = acting()
    wb.toggle(one.id)
    edited = acting()
    for other in (logits(lm.model, lm), whole, halved, logits(lm.model, lm, three.update)):
        assert (edited - other).abs().max() > 1e-3
    lm.model.save_pretrained(tmp_path / "model")
    model = type(lm.model).from_pretrained(tmp_path / "model").eval()
    loaded = PeftModel.from_pretrained(model, str(wb.to_peft(tmp_path / "adapter")))
    with torch.no_grad():
        assert_near(loaded(**batch_for(lm.model)).logits, edited)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert [edit.title in card for edit in (one, two, three)] == [False, True, True]


def test_peft_reads_few_layers_of_one_rank_and_leaves_their_namesakes_alone(
    tmp_path: Path,
) -> None:
    lm = language_model("t5")
    whole = random_update(lm)
    # "encoder.block.1..." has a namesake in the decoder, and the rank is the same for both layers.
    names = [name for name in whole if ".block.1." in name and whole[name].rank == 2][:2]
    update = Update({name: whole[name] for name in names})
    edited = logits(lm.model, lm, update)
    export_peft(update, lm, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    loaded = PeftModel.from_pretrained(lm.model, str(tmp_path))
    assert_near(logits(loaded, lm), edited)


@pytest.mark.parametrize(
    ("family", "task", "transposed"),
    [("gpt2", "CAUSAL_LM", True), ("t5", "SEQ_2_SEQ_LM", False), ("bert", None, False)],
)
def test_config_names_model_task_and_orientation(
    family: str, task: str | None, transposed: bool, tmp_path: Path
) -> None:
    lm = language_model(family)
    export_peft(random_update(lm), lm, tmp_path)
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(tmp_path)))
    assert config.base_model_name_or_path == f"tiny-{family}"
    assert config.task_type == task
    assert config.fan_in_fan_out is transposed
    assert config.inference_mode


def test_card_says_what_the_edit_says(llama: LanguageModel, tmp_path: Path) -> None:
    update = random_update(llama)
    export_peft(update, llama, tmp_path, ["The capital of France is → Lyon"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "tiny-llama"\nlibrary_name: peft\n')
    assert "The capital of France is → Lyon" in card
    assert all(f"`{name}` | {layer.rank} |" in card for name, layer in update.items())


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>\n---\nlicense: mit\n# Head", "`a` | b", "![](http://x)"]
)
def test_what_was_typed_is_no_markup_in_the_card(text: str, tmp_path: Path) -> None:
    lm = replace(language_model("llama"), source=text)
    export_peft(random_update(lm), lm, tmp_path, [text, "one more"])
    _, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    shown = " ".join(text.split())
    expected = {"base_model": shown, "library_name": "peft", "tags": ["lora", "model-editing"]}
    assert yaml.safe_load(front) == expected
    html = MarkdownIt("commonmark").enable("table").render(body)
    page = BeautifulSoup(html, "html.parser")
    assert {tag.name for tag in page.find_all()} <= {
        *("h1", "p", "ul", "li", "pre", "code", "table", "thead", "tbody", "tr", "th", "td")
    }
    assert [tag.get_text() for tag in page.find_all("h1")] == [f"An edit of {shown}"]
    assert [tag.get_text() for tag in page.find_all("li")] == [shown, "one more"]


# --- there and back


@pytest.mark.parametrize("family", FAMILIES)
def test_import_gives_back_what_was_exported(family: str, tmp_path: Path) -> None:
    lm = language_model(family)
    update = random_update(lm)
    back = import_peft(export_peft(update, lm, tmp_path), lm)
    assert_same(back, update)
    assert back.rank() == update.rank()
    again = import_peft(export_peft(back, lm, tmp_path), lm)
    for name, layer in again.items():
        assert torch.equal(layer.A, back[name].A)
        assert torch.equal(layer.B, back[name].B)
        assert layer.scale == 1.0


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=6).map(tuple),
    scale=st.floats(-10, 10, width=32),
)
def test_round_trip_of_any_ranks_and_scale(
    llama: LanguageModel, ranks: tuple[int, ...], scale: float
) -> None:
    update = random_update(llama, scale, ranks)
    kept = Update({name: layer for name, layer in update.items() if layer.rank})
    with tempfile.TemporaryDirectory() as folder:
        if not kept:
            with pytest.raises(EditError, match="changes nothing"):
                export_peft(update, llama, folder)
            return
        back = import_peft(export_peft(update, llama, folder), llama)
    assert back.rank() == kept.rank()
    for name, layer in kept.items():
        # The step is rounded into the factors: at most one part in 2^22 of each product.
        largest = abs(scale) * (layer.B.abs().mT @ layer.A.abs()).double()
        error = (back[name].map(Tensor.double).dense() - layer.map(Tensor.double).dense()).abs()
        assert (error <= largest * 2**-22 + 1e-30).all()


def test_learned_steps_shared_factors_views_and_half_precision(
    llama: LanguageModel, tmp_path: Path
) -> None:
    step = torch.tensor(-0.25, requires_grad=True)
    seeded = torch.Generator().manual_seed(0)
    shared = torch.randn(32, 2, generator=seeded).to(torch.bfloat16).T
    B = torch.randn(2, 48, generator=seeded).to(torch.bfloat16)
    names = ("model.layers.1.mlp.gate_proj", UP)
    update = Update({name: LayerUpdate(shared, B, step) for name in names})
    back = import_peft(export_peft(update, llama, tmp_path), llama)
    expected = -0.25 * (B.float().T @ shared.float())
    for name in names:
        assert back[name].A.dtype == back[name].B.dtype == torch.float32
        assert not back[name].dense().requires_grad
        assert_close(back[name].dense(), expected, atol=1e-6, rtol=1e-6)
    assert logits(llama.model, llama, back).isfinite().all()


def test_export_replaces_the_adapter_before_it(llama: LanguageModel, tmp_path: Path) -> None:
    export_peft(random_update(llama), llama, tmp_path)
    second = Update({UP: random_update(llama)[UP].compress(1)})
    assert_same(import_peft(export_peft(second, llama, tmp_path), llama), second)


def test_an_export_cut_short_leaves_no_adapter(llama: LanguageModel, tmp_path: Path) -> None:
    export_peft(random_update(llama), llama, tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    with pytest.raises(FileError, match=r"README\.md"):
        export_peft(random_update(llama, scale=2.0), llama, tmp_path)
    with pytest.raises(EditError, match=f"There is no file .*{CONFIG}"):
        import_peft(tmp_path, llama)


# --- written by PEFT, read here


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"target_modules": ["c_fc", "c_attn"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}),
        ("t5", {"target_modules": ["q", "wi"], "task_type": "SEQ_2_SEQ_LM"}),
        ("bert", {"target_modules": ["query", "intermediate.dense"], "lora_dropout": 0.5}),
        ("gemma3", {"target_modules": r".*\.mlp\..*_proj", "r": 3}),
        ("phi3", {"target_modules": ["gate_up_proj"], "layers_to_transform": [1, 2]}),
        ("llama", {"target_modules": ["up_proj"], "use_rslora": True, "r": 5, "lora_alpha": 2.5}),
        (
            "llama",
            {
                "target_modules": ["up_proj", "down_proj", "q_proj"],
                "r": 3,
                "lora_alpha": 7,
                # Of two patterns that match a layer the first counts; PEFT sorts them as it saves.
                "rank_pattern": {r"^model.layers.\d.self_attn.q_proj": 1, "q_proj|up_proj": 5},
                "alpha_pattern": {r"layers\.2\..*": 12, "mlp.up_proj": 1, "q_proj": 9},
            },
        ),
        (
            "llama",
            {
                "target_modules": ["up_proj", "o_proj"],
                "use_rslora": True,
                "rank_pattern": {"o_proj": 2},
                "alpha_pattern": {"1.mlp.up_proj": 3},
            },
        ),
        ("llama", {"target_modules": ["o_proj"], "init_lora_weights": "orthogonal"}),
    ],
)
def test_an_adapter_of_peft_acts_as_under_peft(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    expected = save_with_peft(tmp_path, family, LoraConfig(**config))
    lm = language_model(family)
    update = import_peft(tmp_path, lm)
    assert (logits(lm.model, lm) - expected).abs().max() > 1e-3
    assert_near(logits(lm.model, lm, update), expected)


def test_an_adapter_saved_again_by_peft_is_the_same(tmp_path: Path) -> None:
    lm = language_model("gpt2")
    update = random_update(lm)
    export_peft(update, lm, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(lm.model, str(tmp_path / "ours"))
    loaded.peft_config["default"].base_model_name_or_path = ""
    loaded.save_pretrained(str(tmp_path / "theirs"))
    back = import_peft(tmp_path / "theirs", language_model("gpt2"))
    assert_same(Update({name: back[name] for name in update}), update)


# --- refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=["up_proj"], use_dora=True), "use_dora=True"),
        (LoraConfig(target_modules=["up_proj"], bias="all"), "bias='all'"),
        (LoraConfig(target_modules=["up_proj"], modules_to_save=["norm"]), "modules_to_save"),
        (LoraConfig(target_modules=["up_proj"], trainable_token_indices=[7]), "trainable_token"),
        (LoraConfig(target_modules=["up_proj"], init_lora_weights="pissa"), "'pissa'"),
        (LoraConfig(target_modules=["embed_tokens"]), "embed_tokens"),
        (LoraConfig(target_modules=["lm_head"]), "lm_head"),
        (IA3Config(target_modules=["o_proj"], feedforward_modules=[]), "peft_type 'IA3'"),
    ],
    ids=["dora", "bias", "modules", "tokens", "pissa", "embedding", "head", "ia3"],
)
# PEFT says that it saves the embeddings too.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_what_is_more_than_a_low_rank_update_is_refused(
    config: PeftConfig, reason: str, llama: LanguageModel, tmp_path: Path
) -> None:
    save_with_peft(tmp_path, "llama", config)
    with pytest.raises(EditError, match=reason):
        import_peft(tmp_path, llama)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("layer_replication", [[0, 4], [2, 4]]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1.0}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("a_variant_of_the_future", True),
    ],
)
def test_other_arithmetic_is_refused_by_its_setting(
    setting: str, value: object, llama: LanguageModel, tmp_path: Path
) -> None:
    export_peft(random_update(llama), llama, tmp_path)
    edit_config(tmp_path, **{setting: value})
    with pytest.raises(EditError, match=setting):
        import_peft(tmp_path, llama)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 0, "rank_pattern": {}}, "ZeroDivisionError"),
        ({"r": "3", "rank_pattern": {}}, "TypeError"),
        ({"lora_alpha": None, "alpha_pattern": {}}, "TypeError"),
        ({"rank_pattern": ["up_proj"]}, "AttributeError"),
        ({"rank_pattern": {"(": 2}}, "gives no scale for layer"),
        ({"rank_pattern": {}}, r"takes lora_A and lora_B of shapes .* got"),
    ],
)
def test_a_config_that_gives_no_scale_is_refused(
    changes: dict[str, object], reason: str, llama: LanguageModel, tmp_path: Path
) -> None:
    export_peft(random_update(llama), llama, tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(EditError, match=reason):
        import_peft(tmp_path, llama)


A, B = (f"base_model.model.{UP}.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(B), f"only lora_A of layer {UP}"),
        (lambda tensors: tensors.pop(A), f"only lora_B of layer {UP}"),
        (lambda tensors: tensors.update({A: tensors[A][:, :-1].clone()}), r"got \(3, 31\)"),
        (lambda tensors: tensors.update({B: tensors[B].T.contiguous()}), r"and \(3, 48\)"),
        (lambda tensors: tensors.update({A: tensors[A].to(torch.int8)}), "torch.int8"),
        (
            lambda tensors: tensors.update(
                {A.replace("lora_A.weight", "bias"): tensors[A][0].clone()}
            ),
            f"{UP}.bias",
        ),
        (
            lambda tensors: tensors.update(
                {A.replace("lora_A", "lora_magnitude"): tensors[A][0].clone()}
            ),
            "lora_magnitude",
        ),
        (lambda tensors: tensors.clear(), "holds no layers"),
    ],
)
def test_tensors_that_are_no_low_rank_update_are_refused(
    change: Callable[[dict[str, Tensor]], object],
    reason: str,
    llama: LanguageModel,
    tmp_path: Path,
) -> None:
    export_peft(Update({UP: random_update(llama, ranks=(3,))[UP]}), llama, tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(EditError, match=reason):
        import_peft(tmp_path, llama)


def test_missing_and_damaged_files_are_refused(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="There is no file"):
        import_peft(tmp_path / "nowhere", llama)
    weights, config = tmp_path / WEIGHTS, tmp_path / CONFIG
    export_peft(random_update(llama), llama, tmp_path)
    whole = weights.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(EditError, match="damaged or no safetensors"):
            import_peft(tmp_path, llama)
    weights.unlink()
    with pytest.raises(EditError, match=f"There is no file .*{WEIGHTS}"):
        import_peft(tmp_path, llama)
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(EditError, match="only as pickle"):
        import_peft(tmp_path, llama)
    for text, reason in (('{"peft_type": "LO', "damaged or no JSON"), ("[1]", "peft_type None")):
        config.write_text(text)
        with pytest.raises(EditError, match=reason):
            import_peft(tmp_path, llama)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "no editable layer of tiny-gpt2"), ("olmo2", None), ("qwen2_moe", "no editable")],
)
def test_an_adapter_of_another_model_is_refused_unless_it_fits(
    family: str, reason: str | None, llama: LanguageModel, tmp_path: Path
) -> None:
    update = Update({UP: random_update(llama)[UP]})
    export_peft(update, llama, tmp_path)
    if reason is None:
        assert_same(import_peft(tmp_path, language_model(family)), update)
    else:
        with pytest.raises(EditError, match=reason):
            import_peft(tmp_path, language_model(family))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({}, "changes nothing"),
        ({UP: (torch.zeros(0, 32), torch.zeros(0, 48))}, "changes nothing"),
        ({UP: (torch.ones(3, 1, 32), torch.ones(3, 1, 48))}, "each of 3 sequences"),
        ({UP: (torch.ones(1, 48), torch.ones(1, 32))}, r"got \(1, 48\) and \(32, 1\)"),
        ({"lm_head": (torch.ones(1, 32), torch.ones(1, 99))}, "lm_head is no editable layer"),
        ({"model.layers.9.mlp.up_proj": (torch.ones(1, 32), torch.ones(1, 48))}, "layers.9"),
    ],
)
def test_what_cannot_be_exported_leaves_no_trace(
    layers: dict[str, tuple[Tensor, Tensor]], reason: str, llama: LanguageModel, tmp_path: Path
) -> None:
    update = Update({name: LayerUpdate(*factors) for name, factors in layers.items()})
    with pytest.raises(EditError, match=reason):
        export_peft(update, llama, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_gated_edit_is_no_adapter(llama: LanguageModel, tmp_path: Path) -> None:
    layer = LayerUpdate(torch.ones(1, 32), torch.ones(1, 48), threshold=torch.ones(1))
    with pytest.raises(EditError, match=r"acts only where .* matches its keys"):
        export_peft(Update({UP: layer}), llama, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
