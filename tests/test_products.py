"""Products by oneDNN: the numbers of torch's own, to rounding, and what is left to torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.runs import editor_for, edits_for
from workbench import products
from workbench.products import OneDnnProducts, quick_products
from workbench.training import MetaStep, StepLosses, TrainingConfig

pytestmark = pytest.mark.skipif(
    not products.available(),
    reason="this torch has no oneDNN; builds for x86 have it",
)


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Apart by rounding, by the size of the largest number."""
    size = expected.detach().abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * size)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the inputs of each product that oneDNN was given."""
    shapes, apply = list[torch.Size](), products._Product.apply

    def counted(inputs: Tensor, *rest: Tensor) -> Tensor:
        shapes.append(inputs.shape)
        return apply(inputs, *rest)

    monkeypatch.setattr(products._Product, "apply", counted)
    return shapes


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (0, 8)])
@pytest.mark.parametrize("bias", [None, frozen(6)])
def test_products_and_their_gradients_are_those_of_torch(
    shape: tuple[int, ...], bias: Tensor | None
):
    inputs, weight = torch.randn(shape, requires_grad=True), frozen(6, 8)
    expected = linear(inputs, weight, bias)
    (slope,) = torch.autograd.grad(expected.square().sum(), inputs)
    with OneDnnProducts():
        found = linear(inputs, weight, bias)
    assert_near(found, expected)
    assert_near(torch.autograd.grad(found.square().sum(), inputs)[0], slope)


def test_a_product_is_differentiated_twice():
    inputs, weight = torch.randn(4, 8, requires_grad=True), frozen(6, 8)

    def second() -> Tensor:
        (slope,) = torch.autograd.grad(
            linear(inputs, weight).pow(3).sum(), inputs, create_graph=True
        )
        return torch.autograd.grad(slope.square().sum(), inputs)[0]

    expected = second()
    with OneDnnProducts():
        assert_near(second(), expected)


def test_conv1d_is_one_of_them(called: list[torch.Size]):
    bias, inputs, weight = frozen(6), torch.randn(4, 8), frozen(8, 6)
    with OneDnnProducts():
        assert_near(torch.addmm(bias, inputs, weight), inputs @ weight + bias)
    assert called == [inputs.shape]


@pytest.mark.parametrize(
    "product",
    [
        lambda: linear(torch.randn(4, 8), nn.Parameter(torch.randn(6, 8))),
        lambda: linear(torch.randn(4, 8), frozen(6, 8), nn.Parameter(torch.randn(6))),
        lambda: linear(torch.randn(4, 8).double(), frozen(6, 8).double()),
        lambda: linear(torch.randn(4, 8).bfloat16(), frozen(6, 8).bfloat16()),
        lambda: linear(torch.randn(8), frozen(6, 8)),
        lambda: linear(torch.randn(0, 8), frozen(6, 8)),
        lambda: linear(torch.randn(4, 8, device="meta"), frozen(6, 8).to("meta")),
        lambda: torch.addmm(torch.randn(4, 6), torch.randn(4, 8), frozen(8, 6)),
        lambda: torch.addmm(frozen(6), torch.randn(4, 8), frozen(8, 6), alpha=2),
        lambda: torch.randn(4, 8) @ frozen(8, 6),
    ],
    ids=["weight", "bias", "double", "bfloat16", "vector", "nothing", "meta", "matrix", "a", "@"],
)
def test_all_else_is_left_to_torch(called: list[torch.Size], product: Callable[[], Tensor]):
    with OneDnnProducts():
        found = product()
    assert not called
    assert found.shape[-1] == 6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_step_of_training_is_the_same(
    monkeypatch: pytest.MonkeyPatch, called: list[torch.Size], family: str, checkpointing: bool
):
    def step() -> tuple[StepLosses, list[Tensor]]:
        torch.manual_seed(0)
        editor = editor_for(family).train()
        config = TrainingConfig(checkpointing=checkpointing)
        losses = MetaStep(editor, config).losses(edits_for(editor.lm))
        return losses, [p.grad for p in editor.parameters() if p.grad is not None]

    monkeypatch.setattr(products, "helpful", lambda: False)
    expected = step()
    assert not called
    monkeypatch.setattr(products, "helpful", lambda: True)
    monkeypatch.setattr(products, "_ROWS", 1)
    found = step()
    assert called
    torch.testing.assert_close(vars(found[0]), vars(expected[0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-6)


def test_short_texts_and_other_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "helpful", lambda: True)
    assert not isinstance(quick_products(torch.zeros(2, 4)), OneDnnProducts)
    assert not isinstance(quick_products(torch.zeros(2, 8, device="meta")), OneDnnProducts)
    assert isinstance(quick_products(torch.zeros(2, 8)), OneDnnProducts)


@pytest.mark.parametrize(
    ("name", "avx512", "expected"),
    [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel(R) Xeon(R)", True, False)],
)
def test_they_are_for_cpus_on_which_mkl_is_slow(
    monkeypatch: pytest.MonkeyPatch, name: str, avx512: bool, expected: bool
):
    about = {"cpu_name": name, "avx512_f": avx512}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.helpful.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert products.helpful.__wrapped__() is False
