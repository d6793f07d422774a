"""Gradient factors equal autograd's dense gradients, and capturing them leaves no trace."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import FAMILIES, batch_for, language_model
from references import assert_exact, editable, hook_count, in_double, losses
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from workbench.errors import EditError
from workbench.factors import Factors, capture
from workbench.models import LanguageModel


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return language_model(request.param)


@pytest.fixture(scope="module")
def lm64(lm: LanguageModel) -> LanguageModel:
    return in_double(lm)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return in_double(language_model("llama"))


def padded(lm: LanguageModel, padding: str = "right") -> dict[str, Tensor]:
    """A batch; left-padded causal models count positions from each text's first token."""
    inputs = batch_for(lm.model, padding=padding)
    if padding == "left" and lm.kind == "causal":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs["labels"][inputs["position_ids"] == 0] = -100  # nothing stands before the first
    return inputs


def captured(lm: LanguageModel, inputs: dict[str, Tensor]) -> dict[str, Factors]:
    with capture(editable(lm)) as tap:
        each = losses(lm.model, inputs)
        return tap.factors(each.sum(), len(each))


def dense_gradients(lm: LanguageModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Autograd's gradient of an unfrozen copy's weights, `(out, in)`."""
    twin = copy.deepcopy(lm.model).requires_grad_(True)
    losses(twin, inputs).sum().backward()
    found = {}
    for layer in editable(lm):
        module = twin.get_submodule(layer.name)
        gradient = module.get_parameter("weight").grad
        assert gradient is not None
        found[layer.name] = gradient.T if isinstance(module, Conv1D) else gradient
    return found


def assert_untouched(lm: LanguageModel) -> None:
    assert hook_count(lm.model) == 0
    for parameter in lm.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_factors_sum_to_the_dense_gradient(lm: LanguageModel) -> None:
    inputs = padded(lm)
    found = captured(lm, inputs)
    for name, gradient in dense_gradients(lm, inputs).items():
        assert_close(found[name].gradient(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_factors_sum_to_the_dense_gradient_in_double(lm64: LanguageModel, padding: str) -> None:
    inputs = padded(lm64, padding)
    found = captured(lm64, inputs)
    assert list(found) == [layer.name for layer in editable(lm64)]
    for name, gradient in dense_gradients(lm64, inputs).items():
        assert gradient.any()
        assert_exact(found[name].gradient(), gradient)


def test_each_sequence_has_the_factors_of_its_own_loss(lm64: LanguageModel) -> None:
    inputs = padded(lm64)
    together = captured(lm64, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        for name in ("input_ids", "attention_mask", "labels"):
            if name != "labels" or lm64.kind == "causal":
                alone[name] = alone[name][:, :length]
        for name, own in captured(lm64, alone).items():
            mine, tokens = together[name], own.delta.shape[1]
            # Norms and rotations that models compute in float32 set the precision here.
            close = partial(assert_close, rtol=1e-4, atol=1e-6)
            close(mine.activation[row, :tokens], own.activation[0])
            close(mine.delta[row, :tokens], own.delta[0])


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_carries_no_gradient(lm: LanguageModel, padding: str) -> None:
    if lm.kind == "classifier":
        padding = "right"  # it reads its first position, which must not be padding
    inputs = padded(lm, padding)
    found = captured(lm, inputs)
    empty = inputs["attention_mask"] == 0
    for layer in editable(lm):
        factors = found[layer.name]
        assert factors.delta.shape[:2] == factors.activation.shape[:2]
        if factors.delta.shape[1] == empty.shape[1]:
            assert not factors.delta[empty].any()
            assert not factors.live()[empty].any()
        assert factors.live().any(1).all()


def test_capturing_leaves_no_trace(lm: LanguageModel) -> None:
    state, checksum = torch.random.get_rng_state(), lm.checksum()
    captured(lm, padded(lm))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lm.checksum() == checksum
    assert_untouched(lm)


def test_nothing_below_the_first_edited_layer_enters_the_graph(lm: LanguageModel) -> None:
    layers = editable(lm)
    grown: dict[str, bool] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            output = output[0] if isinstance(output, tuple) else output
            grown[name] = grown.get(name, False) or output.requires_grad

        handles.append(module.register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for module in lm.model.modules():
        if isinstance(module, nn.Embedding):
            watch("embeddings", module)
    blocks = lm.stacks[0].blocks
    for index, block in enumerate(blocks):
        watch(f"block {index}", block)
    with capture(layers) as tap:
        loss = losses(lm.model, padded(lm)).sum()
    for handle in handles:
        handle.remove()
    first = layers[0].block
    assert first > 0
    assert not grown["embeddings"]
    for index in range(len(blocks)):
        assert grown[f"block {index}"] == (index >= first)
    assert tap.factors(loss, 3)[layers[0].name].delta.any()


def interrupt(_: Tensor) -> None:
    raise KeyboardInterrupt


def test_no_trace_after_an_exception(lm: LanguageModel) -> None:
    with pytest.raises(KeyboardInterrupt), capture(editable(lm)):
        interrupt(losses(lm.model, padded(lm)))
    assert_untouched(lm)


def test_a_second_forward_pass_is_refused(lm: LanguageModel) -> None:
    with capture(editable(lm)):
        losses(lm.model, padded(lm))
        with pytest.raises(EditError, match="ran twice"):
            losses(lm.model, padded(lm))
    assert_untouched(lm)


def test_layers_that_never_ran_are_named(llama: LanguageModel) -> None:
    layers = editable(llama)
    with capture(layers) as tap, pytest.raises(EditError, match=layers[0].name):
        tap.factors(torch.zeros(()))


def test_a_layer_that_does_not_reach_the_loss_has_no_delta(llama: LanguageModel) -> None:
    last = llama.layers(blocks=[-1], matrices=["down_proj", "o_proj"])
    hidden: list[Tensor] = []
    handle = last[1].module.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with capture(last) as tap:
        losses(llama.model, padded(llama))
        found = tap.factors(hidden[0].sum(), 3)
    handle.remove()
    assert found[last[0].name].delta.any()
    assert not found[last[1].name].delta.any()


def test_nested_captures_each_see_their_own_forward_pass(llama: LanguageModel) -> None:
    one, two = padded(llama), padded(llama, "left")
    with capture(editable(llama)) as outer:
        outer_loss = losses(llama.model, one).sum()
        with capture(editable(llama)) as inner:
            inner_loss = losses(llama.model, two).sum()
            inside = inner.factors(inner_loss, 3)
        outside = outer.factors(outer_loss, 3)
    assert_untouched(llama)
    for found, expected in ((outside, captured(llama, one)), (inside, captured(llama, two))):
        for name, factors in expected.items():
            assert torch.equal(found[name].activation, factors.activation)
            assert torch.equal(found[name].delta, factors.delta)


def test_another_threads_forward_pass_is_not_recorded(llama: LanguageModel) -> None:
    mine, other = padded(llama), padded(llama, "left")
    expected = captured(llama, mine)
    with capture(editable(llama)) as tap:
        thread = threading.Thread(target=losses, args=(llama.model, other))
        thread.start()
        thread.join()
        found = tap.factors(losses(llama.model, mine).sum(), 3)
    for name, factors in expected.items():
        assert torch.equal(found[name].delta, factors.delta)


def test_two_threads_capture_at_the_same_time(llama: LanguageModel) -> None:
    batches = [padded(llama), padded(llama, "left")]
    expected = [captured(llama, inputs) for inputs in batches]
    found: dict[int, dict[str, Factors]] = {}
    barrier = threading.Barrier(2, timeout=60)

    def work(index: int) -> None:
        with capture(editable(llama)) as tap:
            barrier.wait()
            loss = losses(llama.model, batches[index]).sum()
            barrier.wait()
            found[index] = tap.factors(loss, 3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for name, factors in expected[index].items():
            assert torch.equal(found[index][name].activation, factors.activation)
            assert torch.equal(found[index][name].delta, factors.delta)


# --- the rows --------------------------------------------------------------------------------


def test_rows_are_live_where_neither_factor_is_zero() -> None:
    activation, delta = torch.zeros(3, 4, 2), torch.zeros(3, 4, 5)
    activation[0, :3, 1], delta[0, 1:, 4] = 2.0, -1.0
    activation[1] = 1.0
    activation[2, 0], delta[2, 0] = 1.0, 1.0
    factors = Factors(activation, delta)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[0, 1:3] = expected[2, 0] = True
    assert torch.equal(factors.live(), expected)
    assert factors.last_live().tolist() == [2, 0, 0]
    assert Factors(activation.to("meta"), delta.to("meta")).last_live().is_meta


def test_factors_are_a_value_that_is_only_itself() -> None:
    factors = Factors(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    assert factors == factors
    assert factors != replace(factors)
    with pytest.raises(AttributeError):
        factors.delta = factors.activation  # pyright: ignore[reportAttributeAccessIssue]


def test_rows_of_all_sequences_in_one_axis_are_parted(llama: LanguageModel) -> None:
    layer = editable(llama)[0]
    rows = torch.arange(6.0 * layer.in_features, dtype=torch.float64).view(6, -1)

    def found(*sequences: int) -> Factors:
        with capture([layer]) as tap:
            loss = layer.module(rows).square().sum()
            return tap.factors(loss, *sequences)[layer.name]

    for sequences in (1, 2, 3):
        factors = found(sequences)
        assert torch.equal(factors.activation, rows.view(sequences, 6 // sequences, -1))
        expected = 2 * layer.module(rows).view(sequences, 6 // sequences, -1)
        assert torch.equal(factors.delta, expected)
    assert torch.equal(found().delta, found(1).delta)


# --- the graph -------------------------------------------------------------------------------


def test_factors_of_a_plain_capture_have_no_graph(llama: LanguageModel) -> None:
    for factors in captured(llama, padded(llama)).values():
        assert not factors.activation.requires_grad
        assert not factors.delta.requires_grad


def test_factors_that_keep_the_graph_are_functions_of_the_weights(llama: LanguageModel) -> None:
    twin = in_double(llama)
    layers = editable(twin)
    weights = [layer.module.get_parameter("weight").requires_grad_() for layer in layers]
    with sdpa_kernel(SDPBackend.MATH), capture(layers, graph=True) as tap:  # others go once only
        loss = losses(twin.model, padded(twin)).sum()
        found = [factors.gradient() for factors in tap.factors(loss, 3).values()]
        expected = torch.autograd.grad(loss, weights, create_graph=True)
        slopes = [
            torch.autograd.grad(
                torch.stack([g.square().sum() for g in gradients]).sum(), weights, retain_graph=True
            )
            for gradients in (found, expected)
        ]
    for one, other in zip(*slopes, strict=True):
        assert other.any()
        assert_close(one, other, rtol=1e-4, atol=1e-6)  # norms computed in float32


def test_gradients_are_on_in_a_capture(llama: LanguageModel) -> None:
    inputs = padded(llama)
    expected = captured(llama, inputs)
    with torch.no_grad():
        found = captured(llama, inputs)
    for name, factors in expected.items():
        assert torch.equal(found[name].delta, factors.delta)


def test_a_capture_starts_anew_with_each_set_of_factors(llama: LanguageModel) -> None:
    batches = [padded(llama), padded(llama, "left")]
    with capture(editable(llama)) as tap:
        found = [tap.factors(losses(llama.model, inputs).sum(), 3) for inputs in batches]
    for inputs, mine in zip(batches, found, strict=True):
        for name, factors in captured(llama, inputs).items():
            assert torch.equal(mine[name].delta, factors.delta)


def test_a_capture_of_no_layer_silences_the_one_around_it(llama: LanguageModel) -> None:
    mine, other = padded(llama), padded(llama, "left")
    with capture(editable(llama)) as tap:
        with capture(()):
            losses(llama.model, other)
        found = tap.factors(losses(llama.model, mine).sum(), 3)
    for name, factors in captured(llama, mine).items():
        assert torch.equal(found[name].delta, factors.delta)
