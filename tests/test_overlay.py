"""The frozen model under an overlay equals the really edited one, and nothing of it stays."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, batch_for, language_model
from references import (
    assert_exact,
    assert_near,
    editable,
    edited_copy,
    hook_count,
    in_double,
    logits_of,
    random_update,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softshrink
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from workbench.errors import EditError
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.stacking import stack_sequences
from workbench.updates import LayerUpdate, Update

GENERATING = [family for family in FAMILIES if family != "bert"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return language_model(request.param)


@pytest.fixture(scope="module")
def lm64(lm: LanguageModel) -> LanguageModel:
    return in_double(lm)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return language_model("llama")


def double_update(lm: LanguageModel, seed: int = 0, batch: int | None = None) -> Update:
    return random_update(editable(lm), seed, batch=batch, dtype=torch.float64)


def under(lm: LanguageModel, update: Update | None, inputs: dict[str, Tensor]) -> Tensor:
    with overlay(lm.model, update):
        return logits_of(lm.model, inputs)


# --- equal to the edited model ---------------------------------------------------------------


def test_logits_equal_the_edited_models(lm: LanguageModel) -> None:
    inputs, update = batch_for(lm.model), random_update(editable(lm))
    expected = logits_of(edited_copy(lm.model, update), inputs)
    assert not torch.allclose(expected, logits_of(lm.model, inputs), atol=1e-4)
    assert_near(under(lm, update, inputs), expected)


def test_logits_equal_the_edited_models_in_double(lm64: LanguageModel) -> None:
    inputs, update = batch_for(lm64.model), double_update(lm64)
    expected = logits_of(edited_copy(lm64.model, update), inputs)
    assert_exact(under(lm64, update, inputs), expected)


def test_a_gated_update_acts_where_the_input_reaches_its_thresholds(lm64: LanguageModel) -> None:
    layer, inputs = editable(lm64)[0], batch_for(lm64.model)
    (plain,) = random_update([layer], size=3.0, dtype=torch.float64).values()
    read = layer_calls(lm64, layer, None, inputs)[0]
    limits = (read @ plain.A.T).abs().flatten(0, -2).median(0).values
    change = replace(plain, threshold=limits)
    read, wrote = layer_calls(lm64, layer, Update({layer.name: change}), inputs)
    keyed = read @ change.A.T
    shrunk = torch.stack([softshrink(keyed[..., t], limits[t].item()) for t in range(2)], -1)
    assert (shrunk != 0).any()
    assert (shrunk == 0).any()
    assert_exact(wrote, layer.module.forward(read) + change.scale * (shrunk @ change.B))


def layer_calls(
    lm: LanguageModel, layer: EditableLayer, update: Update | None, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What a layer reads and writes in a forward pass under an update."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))

    with overlay(lm.model, update):
        handle = layer.module.register_forward_hook(keep)
        logits_of(lm.model, inputs)
        handle.remove()
    return seen[0]


def test_each_sequence_has_its_own_update(lm64: LanguageModel) -> None:
    inputs = batch_for(lm64.model)
    updates = [double_update(lm64, seed=1), None, double_update(lm64, seed=2)]
    found = under(lm64, stack_sequences(updates), inputs)
    for row, update in enumerate(updates):
        twin = edited_copy(lm64.model, update or Update({}))
        assert_exact(found[row], logits_of(twin, inputs)[row])


def test_base_and_edited_run_in_one_batch(lm64: LanguageModel) -> None:
    inputs, update = batch_for(lm64.model), double_update(lm64)
    acts = torch.tensor([True, False, True])
    base = logits_of(lm64.model, inputs)
    with overlay(lm64.model, update, acts):
        found = logits_of(lm64.model, inputs)
    assert torch.equal(found[1], base[1])
    assert_exact(found[acts], under(lm64, update, inputs)[acts])


def test_nested_overlays_add_up(lm64: LanguageModel) -> None:
    inputs, layers = batch_for(lm64.model), editable(lm64)
    one = double_update(lm64, seed=1)
    two = random_update(layers[::2], seed=2, dtype=torch.float64)
    with overlay(lm64.model, one):
        nested = under(lm64, two, inputs)
        alone = logits_of(lm64.model, inputs)
    assert_exact(nested, logits_of(edited_copy(lm64.model, one + two), inputs))
    assert_exact(alone, logits_of(edited_copy(lm64.model, one), inputs))


def test_gradients_equal_those_through_dense_weights(lm64: LanguageModel) -> None:
    inputs = {k: v for k, v in batch_for(lm64.model).items() if k != "labels"}
    leaves = {
        name: tuple(
            value.clone().requires_grad_()
            for value in (layer.A, layer.B, torch.tensor(layer.scale, dtype=torch.float64))
        )
        for name, layer in double_update(lm64).items()
    }
    flat = [leaf for factors in leaves.values() for leaf in factors]
    with overlay(lm64.model, Update({k: LayerUpdate(*v) for k, v in leaves.items()})):
        found = torch.autograd.grad(lm64.model(**inputs).logits.square().mean(), flat)
    weights = {}
    for name, (A, B, scale) in leaves.items():
        module, change = lm64.model.get_submodule(name), scale * (B.T @ A)
        change = change.T if isinstance(module, Conv1D) else change
        weights[f"{name}.weight"] = module.get_parameter("weight") + change
    output = functional_call(lm64.model, weights, (), inputs)
    expected = torch.autograd.grad(output.logits.square().mean(), flat)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        assert_exact(one, other)


@pytest.mark.parametrize("lm", GENERATING, indirect=True, scope="module")
def test_greedy_generation_with_a_cache_equals_the_edited_models(lm64: LanguageModel) -> None:
    left = batch_for(lm64.model, padding="left")
    inputs = {name: left[name] for name in ("input_ids", "attention_mask")}
    update = double_update(lm64) * 8

    def generate(model: Any) -> Tensor:
        return model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)

    expected = generate(edited_copy(lm64.model, update))
    base = generate(lm64.model)
    with overlay(lm64.model, update):
        assert torch.equal(generate(lm64.model), expected)
    assert torch.equal(generate(lm64.model), base)
    assert not torch.equal(base, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_models_take_float32_updates(family: str) -> None:
    lm = language_model(family)
    lm.model.bfloat16()
    layer = editable(lm)[0]
    update = random_update([layer])
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        base = layer.module(x)
        with overlay(lm.model, update):
            found = layer.module(x)
    change = x.double() @ update[layer.name].dense().double().T
    assert found.dtype == torch.bfloat16
    assert_close(found.double(), base.double() + change, rtol=2**-7, atol=2**-8)
    inputs = batch_for(lm.model)
    logits = under(lm, update, inputs)
    assert logits.dtype == torch.bfloat16
    assert not torch.equal(logits, logits_of(lm.model, inputs))


# --- leaves no trace -------------------------------------------------------------------------


def assert_as_before(lm: LanguageModel, run: Callable[[], object]) -> None:
    inputs, context = batch_for(lm.model), dict(contextvars.copy_context())
    base, checksum = logits_of(lm.model, inputs), lm.checksum()
    run()
    assert hook_count(lm.model) == 0
    assert dict(contextvars.copy_context()) == context
    assert torch.equal(logits_of(lm.model, inputs), base)
    assert lm.checksum() == checksum
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


def test_nothing_stays_after_the_end(lm: LanguageModel) -> None:
    update = random_update(editable(lm))
    update = update.map(lambda factor: factor.requires_grad_())

    def run() -> None:
        with overlay(lm.model, update), overlay(lm.model, -update):
            lm.model(**batch_for(lm.model)).loss.backward()

    assert_as_before(lm, run)


def interrupt(_: Tensor) -> None:
    raise KeyboardInterrupt


def test_nothing_stays_after_an_exception(llama: LanguageModel) -> None:
    update = random_update(editable(llama))

    def run() -> None:
        with pytest.raises(KeyboardInterrupt), overlay(llama.model, update):
            interrupt(under(llama, update, batch_for(llama.model)))

    assert_as_before(llama, run)


def test_an_empty_overlay_registers_nothing(llama: LanguageModel) -> None:
    for nothing in (None, Update({})):
        with overlay(llama.model, nothing):
            assert hook_count(llama.model) == 0


def bad_update(lm: LanguageModel, name: str, out_features: int, in_features: int) -> Update:
    layer = LayerUpdate(torch.zeros(1, in_features), torch.zeros(1, out_features))
    return Update({**random_update(editable(lm)), name: layer})


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.9.mlp.up_proj", (48, 32), "does not have"),  # no such block
        ("model.layers.3.mlp.up_proj", (32, 48), "48 -> 32 features; in this model it is 32 -> 48"),
        ("model.layers.3.mlp", (32, 32), "is no linear layer"),
        ("model.layers.3.mlp.act_fn", (32, 32), "is no linear layer"),  # nor has any parameter
        ("", (99, 32), "is no linear layer"),
    ],
)
def test_updates_of_another_model_are_refused(
    llama: LanguageModel, name: str, shape: tuple[int, int], said: str
) -> None:
    def run() -> None:
        with (
            pytest.raises(EditError, match=f"The update changes .*{said}.*another model"),
            overlay(llama.model, bad_update(llama, name, *shape)),
        ):
            pass

    assert_as_before(llama, run)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_other_numbers_of_sequences_are_refused(llama: LanguageModel, batch: int) -> None:
    def run() -> None:
        for update, acts in (
            (random_update(editable(llama), batch=batch), None),
            (random_update(editable(llama)), torch.ones(batch, dtype=torch.bool)),
        ):
            with (
                pytest.raises(EditError, match=f"batch of {batch} sequences"),
                overlay(llama.model, update, acts),
            ):
                logits_of(llama.model, batch_for(llama.model))

    assert_as_before(llama, run)


def test_beams_under_one_update_a_sequence_are_refused(llama: LanguageModel) -> None:
    inputs = batch_for(llama.model, padding="left")
    del inputs["labels"]
    model: Any = llama.model
    with (
        overlay(model, random_update(editable(llama), batch=3)),
        pytest.raises(EditError, match="no beams"),
    ):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)


# --- local to the thread ---------------------------------------------------------------------


def test_threads_see_their_own_overlay_only(llama: LanguageModel) -> None:
    """Every user's updates name other layers too; all overlays are live at the same time."""
    users, rounds = 4, 3
    layers = editable(llama)
    inputs = batch_for(llama.model)
    updates = [None, *(random_update(layers[user:], seed=user) for user in range(1, users))]
    expected = [under(llama, update, inputs) for update in updates]
    barrier = threading.Barrier(users, timeout=60)
    found: dict[int, list[Tensor]] = {user: [] for user in range(users)}

    def work(user: int) -> None:
        for _ in range(rounds):
            with overlay(llama.model, updates[user]):
                barrier.wait()
                found[user].append(logits_of(llama.model, inputs))
                barrier.wait()
            found[user].append(logits_of(llama.model, inputs))

    threads = [threading.Thread(target=work, args=(user,)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for user in range(users):
        assert len(found[user]) == 2 * rounds
        for logits in found[user][::2]:
            assert torch.equal(logits, expected[user])
        for logits in found[user][1::2]:
            assert torch.equal(logits, expected[0])
    assert hook_count(llama.model) == 0


def test_a_new_thread_needs_a_copy_of_the_context(llama: LanguageModel) -> None:
    inputs, update = batch_for(llama.model), random_update(editable(llama))
    base, edited = logits_of(llama.model, inputs), under(llama, update, inputs)
    found: dict[str, Tensor] = {}

    def work(name: str) -> None:
        found[name] = logits_of(llama.model, inputs)

    with overlay(llama.model, update):
        plain = threading.Thread(target=work, args=("plain",))
        context = contextvars.copy_context()
        copied = threading.Thread(target=context.run, args=(work, "copied"))
        for thread in (plain, copied):
            thread.start()
            thread.join()
    assert torch.equal(found["plain"], base)
    assert torch.equal(found["copied"], edited)
    # A context that outlives the overlay keeps nothing alive.
    context.run(work, "late")
    assert torch.equal(found["late"], base)


# --- one layer alone -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_of_all_sequences_in_one_axis_have_their_own_changes(
    llama: LanguageModel, tokens: int
) -> None:
    """As mixture-of-experts blocks put them."""
    layer = editable(llama)[0]
    shape = 3, tokens, layer.in_features
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    acts = torch.tensor([True, False, True])
    for update, sequences in (
        (random_update([layer], batch=3), None),
        (random_update([layer], batch=3), acts),
        (random_update([layer]), acts),
    ):
        with overlay(llama.model, update, sequences):
            expected, found = layer.module(inputs), layer.module(inputs.flatten(0, 1))
            with pytest.raises(EditError, match="batch of 3 sequences, but the model was given 7"):
                layer.module(torch.zeros(7, layer.in_features))
        assert_close(found.view_as(expected), expected)
        change = expected - layer.module(inputs)
        dense = update[layer.name].dense().expand(3, -1, -1)
        wanted = inputs @ dense.mT * (1.0 if sequences is None else acts[:, None, None])
        assert_close(change, wanted, rtol=1e-4, atol=1e-5)


def test_an_update_follows_its_layer_to_another_device() -> None:
    """The meta device stands for any: nothing of it can be computed with the update's own."""
    model = nn.Sequential(nn.Linear(3, 5, device="meta"))
    update = Update({"0": LayerUpdate(torch.ones(1, 3), torch.ones(1, 5))})
    with overlay(model, update, torch.tensor([True, False])):
        assert model(torch.ones(2, 7, 3, device="meta")).shape == (2, 7, 5)
    assert not update["0"].A.is_meta
