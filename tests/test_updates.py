"""The algebra of updates, against the dense matrices they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement, product
from weakref import ReferenceType, ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softshrink
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.errors import EditError
from workbench.stacking import stack_sequences
from workbench.updates import LayerUpdate, Update

SHAPES = {"a": (5, 3), "b": (4, 6)}  # (out, in)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_update(
    rank: int, out_features: int, in_features: int, seed: int = 0, lead: tuple[int, ...] = ()
) -> LayerUpdate:
    A = draw(*lead, rank, in_features, seed=seed)
    B = draw(*lead, rank, out_features, seed=seed + 1)
    return LayerUpdate(A, B, (-1) ** seed * (0.5 + seed % 3))


def update(seed: int, names: str = "ab", rank: int = 2) -> Update:
    return Update({n: layer_update(rank, *SHAPES[n], seed=seed + 7 * ord(n)) for n in names})


def same(found: Update, expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, dense in found.dense().items():
        assert_close(dense, expected[name], rtol=1e-12, atol=1e-12)


sizes = st.integers(1, 7)
layer_updates = st.builds(
    layer_update,
    sizes,
    sizes,
    sizes,
    st.integers(0, 1000),
    st.sampled_from([(), (1,), (3,)]),
)
laws = settings(max_examples=30, deadline=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@laws
@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["a", "b", "ab"]))
def test_inner_products_are_those_of_the_dense_matrices(
    dtype: torch.dtype, one: int, other: int, names: str
) -> None:
    """Summed in double precision, whatever the factors' own."""
    first, second = update(one, rank=3).to(dtype), update(other, names=names).to(dtype)
    dense = first.to(torch.float64).dense(), second.to(torch.float64).dense()
    expected = sum((dense[0][name] * dense[1][name]).sum() for name in names)
    assert first.inner(second) == pytest.approx(float(expected), rel=1e-10, abs=1e-10)


@laws
@given(layer_updates)
def test_a_layer_update_is_its_dense_matrix(layer: LayerUpdate) -> None:
    terms = [
        layer.B[..., t, :].unsqueeze(-1) * layer.A[..., t, :].unsqueeze(-2)
        for t in range(layer.rank)
    ]
    dense = layer.scale * torch.stack(terms).sum(0)
    values = torch.linalg.svdvals(dense)
    spectrum = layer.spectrum()
    assert_close(layer.dense(), dense)
    assert_close(layer.norm(), torch.linalg.matrix_norm(dense).float())
    width = min(layer.rank, *dense.shape[-2:])
    assert spectrum.shape == (*dense.shape[:-2], width)
    assert_close(spectrum, values[..., :width].float(), rtol=1e-6, atol=1e-6)
    assert_close(layer.folded().dense(), dense)
    assert layer.folded().scale == 1.0


@laws
@given(layer_updates, st.integers(1, 8))
def test_compression_is_the_best_approximation(layer: LayerUpdate, rank: int) -> None:
    dense = layer.dense()
    short = layer.compress(rank)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    best = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    assert short.rank == min(rank, layer.rank, *dense.shape[-2:])
    # Eckart-Young: the error is what the dropped singular values hold; the minimum is unique
    # where the last kept value differs from the first dropped one, as with random matrices.
    assert_close(
        torch.linalg.matrix_norm(dense - short.dense()),
        torch.linalg.vector_norm(values[..., rank:], dim=-1),
        rtol=1e-9,
        atol=1e-9,
    )
    assert_close(short.dense(), best, rtol=1e-7, atol=1e-7)


@laws
@given(layer_updates)
def test_compression_to_full_rank_is_exact(layer: LayerUpdate) -> None:
    doubled = LayerUpdate.sum((layer, layer))
    short = doubled.compress(layer.rank)
    assert short.rank <= layer.rank
    assert_close(short.dense(), 2 * layer.dense(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_from_dense_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = draw(*shape, seed=1).to(dtype)
    dense[0, 0] = torch.inf  # which no product with the zeros of an identity survives
    layer = LayerUpdate.from_dense(dense)
    assert layer.rank == min(shape)
    assert layer.A.dtype == layer.B.dtype == dtype
    assert torch.equal(layer.dense(), dense)
    identity = layer.A if shape[1] <= shape[0] else layer.B
    assert torch.equal(identity, torch.eye(min(shape), dtype=dtype))


def test_from_dense_stays_on_the_device_of_the_change() -> None:
    layer = LayerUpdate.from_dense(torch.zeros(5, 3, device="meta"))
    assert layer.A.is_meta
    assert layer.B.is_meta


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_batch_of_dense_changes_is_held_exactly(shape: tuple[int, int]) -> None:
    dense = draw(2, *shape, seed=1)
    dense[0, 0, 0] = torch.inf
    layer = LayerUpdate.from_dense(dense)
    assert layer.rank == 3
    assert torch.equal(layer.dense(), dense)
    assert torch.equal((layer * -2.0).dense(), -2 * dense)


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_identity_that_is_learned_has_its_gradient(side: str) -> None:
    factors = {name: draw(4, 4, seed=n).requires_grad_() for n, name in enumerate("AB")}
    factors[side] = torch.eye(4, dtype=torch.float64).requires_grad_()
    weights = draw(4, 4, seed=5)
    found = (LayerUpdate(**factors, scale=0.5).dense() * weights).sum()
    expected = (0.5 * factors["B"].T @ factors["A"] * weights).sum()
    leaves = [factors["A"], factors["B"]]
    pairs = torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
    for one, other in zip(*pairs, strict=True):
        assert_close(one, other)


@laws
@given(st.integers(0, 1000), st.integers(0, 1000), st.floats(-4, 4))
def test_updates_form_a_vector_space(one: int, two: int, factor: float) -> None:
    u, v = update(one), update(two, "b", rank=3)
    U, V = u.dense(), v.dense()
    same(u + v, {"a": U["a"], "b": U["b"] + V["b"]})
    same(u - v, {"a": U["a"], "b": U["b"] - V["b"]})
    same(v - u, {"a": -U["a"], "b": V["b"] - U["b"]})
    same(u * factor, {name: factor * dense for name, dense in U.items()})
    same(factor * u, {name: factor * dense for name, dense in U.items()})
    same(-u, {name: -dense for name, dense in U.items()})
    same(Update.sum([u, v, u]), {"a": 2 * U["a"], "b": 2 * U["b"] + V["b"]})
    assert (u + v).rank() == {"a": 2, "b": 4}  # 2 + 3 terms of a 4 x 6 matrix


def numbers_of(layer: LayerUpdate) -> int:
    return layer.A.numel() + layer.B.numel()


# Of a part: its rank, with None for a whole matrix, and whether it is gated.
PARTS = list(product((None, 1, 2, 3), (False, True)))


def part(kind: tuple[int | None, bool], shape: tuple[int, ...], seed: int) -> LayerUpdate:
    (rank, gate), (*lead, out_features, in_features) = kind, shape
    if rank is None:
        layer = LayerUpdate.from_dense(draw(*shape, seed=seed)) * (-0.5) ** seed
    else:
        layer = layer_update(rank, out_features, in_features, seed=seed, lead=tuple(lead))
    limits = draw(*layer.A.shape[:-1], seed=seed).abs()
    return replace(layer, threshold=limits) if gate else layer


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (2, 5, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sum_is_the_sum_and_holds_no_more_than_it_must(shape: tuple[int, ...], size: int) -> None:
    inputs, exact = draw(7, shape[-1], seed=9), partial(assert_close, rtol=1e-12, atol=1e-12)
    whole = numbers_of(LayerUpdate.from_dense(draw(*shape, seed=1)))
    for kinds in combinations_with_replacement(PARTS, size):
        layers = [part(kind, shape, seed) for seed, kind in enumerate(kinds)]
        total = LayerUpdate.sum(layers)
        exact(total.dense(), torch.stack([layer.dense() for layer in layers]).sum(0))
        exact(total.apply(inputs), torch.stack([layer.apply(inputs) for layer in layers]).sum(0))
        plain = [numbers_of(layer) for layer in layers if layer.threshold is None]
        gated = [numbers_of(layer) for layer in layers if layer.threshold is not None]
        most = sum(plain) if len(plain) == 1 else min(sum(plain), whole)
        assert numbers_of(total) == most + sum(gated)
        assert size > 1 or total is layers[0]


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_dense_changes_add_up_without_rounding(shape: tuple[int, int]) -> None:
    dense = [draw(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    total = LayerUpdate.sum([LayerUpdate.from_dense(matrix) * 0.3 for matrix in dense])
    assert torch.equal(total.dense(), 0.3 * dense[0] + 0.3 * dense[1] + 0.3 * dense[2])


class Alive(TorchDispatchMode):
    """The most tensors of so many numbers that were held at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most = size, 0
        self.made: list[ReferenceType[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.numel() == self.size:
            self.made = [held for held in (*self.made, ref(made)) if held() is not None]
            self.most = max(self.most, len(self.made))
        return made


@pytest.mark.parametrize("rank", [1, None], ids=["terms", "matrices"])
def test_a_sum_of_more_parts_holds_no_more_matrices_at_once(rank: int | None) -> None:
    most = []
    for size in (12, 24):
        layers = [part((rank, False), (5, 4), seed) for seed in range(size)]
        with Alive(5 * 4) as alive:
            LayerUpdate.sum(layers)
        most.append(alive.most)
    assert most[0] == most[1] > 0


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (3, 1), (3, 3)], ids=str)
def test_a_sum_is_differentiable_in_its_parts(ranks: tuple[int, int]) -> None:
    leaves = [
        draw(rank, width, seed=rank + n).requires_grad_()
        for n, rank in enumerate(ranks)
        for width in (3, 5)
    ]

    def dense(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return LayerUpdate.sum((LayerUpdate(A, B, 0.5), LayerUpdate(C, D))).dense()

    assert torch.autograd.gradcheck(dense, leaves)


def test_the_empty_sum_is_the_empty_update() -> None:
    empty = Update.sum([])
    assert len(empty) == 0
    assert empty.norm() == 0.0
    same(empty + update(1), update(1).dense())


def test_an_update_is_an_immutable_mapping() -> None:
    layers = dict(update(1))
    held = Update(layers)
    layers.clear()
    assert list(held) == ["a", "b"]
    assert held["a"].rank == 2
    with pytest.raises(TypeError):
        held["a"] = held["b"]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        held.layers = {}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_change_is_a_value_that_is_only_itself() -> None:
    """Factors have no truth value to compare by: equal updates hold the same layers."""
    layer, held = layer_update(2, 5, 3), update(1)
    assert layer == layer
    assert layer != replace(layer)
    assert len({layer, replace(layer)}) == 2
    with pytest.raises(AttributeError):
        layer.scale = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    assert held == dict(held)
    assert held != update(1)


def test_figures_of_an_update() -> None:
    u = update(3)
    dense = u.dense()
    assert u.norm() == pytest.approx(
        torch.cat([matrix.flatten() for matrix in dense.values()]).norm().item()
    )
    assert u.numbers() == 2 * (5 + 3) + 2 * (4 + 6)
    for name, values in u.spectrum().items():
        assert_close(values, torch.linalg.svdvals(dense[name])[:2].float())
    assert u.compress(1).rank() == {"a": 1, "b": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compression_keeps_the_dtype(dtype: torch.dtype) -> None:
    short = update(1).to(dtype).compress(1)
    assert {tensor.dtype for tensor in short.tensors()} == {dtype}


def test_tensors_are_all_that_an_update_holds() -> None:
    scale = torch.tensor(2.0)
    first, second = replace(layer_update(2, 5, 3), scale=scale), gated(1)
    found = Update({"a": first, "b": second}).tensors()
    expected = [first.A, first.B, scale, second.A, second.B, second.threshold]
    assert len(found) == len(expected)
    # The very ones, in any order within a layer: what is done to them is done to the update.
    assert {id(tensor) for tensor in found[:3]} == {id(tensor) for tensor in expected[:3]}
    assert {id(tensor) for tensor in found[3:]} == {id(tensor) for tensor in expected[3:]}


@pytest.mark.parametrize("step", [-1.0, 0.0, 1.0, 2.0])
def test_a_folded_update_is_the_same_change_at_scale_1(step: float) -> None:
    u = Update({name: replace(layer, scale=step) for name, layer in update(1).items()})
    assert {layer.scale for layer in u.folded().values()} == {1.0}
    same(u.folded(), u.dense())


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("lead", [(), (7,), (1,)], ids=str)
def test_a_step_is_folded_into_the_narrower_factor(
    shape: tuple[int, int], lead: tuple[int, ...]
) -> None:
    layer = layer_update(6, *shape, lead=lead)
    narrow, wide = "AB" if shape[1] < shape[0] else "BA"
    folded = layer.folded()
    assert getattr(folded, wide) is getattr(layer, wide)
    assert torch.equal(getattr(folded, narrow), layer.scale * getattr(layer, narrow))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("remainder", [0.0, 1e-7, 1e-4])
def test_norms_survive_cancellation(dtype: torch.dtype, remainder: float) -> None:
    """u - u + a little: the norm of what remains, not of the rounding of what went."""
    u, little = update(1, rank=1).to(dtype), update(2, rank=1).to(dtype)
    left = u - u + little * remainder
    exact = Update({name: layer.map(Tensor.double) for name, layer in left.items()}).dense()
    expected = torch.cat([matrix.flatten() for matrix in exact.values()]).norm().item()
    assert left.norm() == pytest.approx(expected, rel=1e-5, abs=1e-13 * u.norm())
    for name, values in left.spectrum().items():
        assert_close(
            values[:2].double(),
            torch.linalg.svdvals(exact[name])[:2],
            rtol=1e-5,
            atol=1e-13 * u.norm(),
        )


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("value", [-0.7, 1.0])
def test_a_tensor_as_scale_is_differentiable(value: float, rank: int) -> None:
    layer = layer_update(rank, 5, 3)
    scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)

    def loss_of(function: Callable[[LayerUpdate], LayerUpdate]) -> Tensor:
        made = function(LayerUpdate(layer.A, layer.B, scale))
        return made.dense().square().sum()

    for function, factor in (
        (lambda u: u, 1.0),
        (LayerUpdate.folded, 1.0),
        (lambda u: -2.0 * u, 4.0),
        (lambda u: u + u, 4.0),
    ):
        (gradient,) = torch.autograd.grad(loss_of(function), scale)
        expected = 2 * scale * (layer.B.mT @ layer.A).square().sum() * factor
        assert_close(gradient, expected)


def test_map_reaches_every_tensor() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    made = Update({"a": LayerUpdate(draw(2, 3, seed=1), draw(2, 5, seed=2), scale)})
    half = made.to(torch.float16)
    layer = half["a"]
    assert isinstance(layer.scale, Tensor)
    assert {layer.A.dtype, layer.B.dtype, layer.scale.dtype} == {torch.float16}
    assert made["a"].dense().requires_grad
    assert not made.detach()["a"].dense().requires_grad
    assert torch.equal(made.detach()["a"].dense(), made["a"].dense())
    assert made.to("meta")["a"].A.is_meta
    assert made.to(dtype=torch.float32)["a"].A.dtype == torch.float32
    first = Update({"a": layer_update(2, 5, 3, lead=(4,))}).map(lambda tensor: tensor[:1])
    assert first["a"].dense().shape == (1, 5, 3)


def test_stacked_sequences_keep_their_own_updates() -> None:
    one, two = update(1, "a", rank=1), update(2, "ab", rank=3)
    stacked = stack_sequences([one, None, two, Update({})])
    dense = stacked.dense()
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for row, expected in enumerate(
        (zero | one.dense(), zero, two.dense(), zero),
    ):
        for name in SHAPES:
            assert_close(dense[name][row], expected[name])
    assert stacked.rank() == {"a": 3, "b": 3}
    assert not stacked.gated


def test_batched_updates_add_and_measure_one_by_one() -> None:
    batched = layer_update(2, 5, 3, seed=1, lead=(3,))
    total = batched + batched * 0.5
    assert batched.inner(total).shape == (3,)
    for row in range(3):
        alone = LayerUpdate(batched.A[row], batched.B[row], batched.scale)
        assert_close(total.dense()[row], 1.5 * alone.dense())
        assert_close(total.norm()[row], 1.5 * alone.norm())
        assert_close(total.spectrum()[row, :2], 1.5 * alone.spectrum())
        assert_close(total.compress(2).dense()[row], 1.5 * alone.dense())
        assert_close(batched.inner(total)[row], 1.5 * alone.dense().square().sum())
    whole = Update({"a": batched}).inner(Update({"a": total}))
    assert whole == pytest.approx(float(batched.inner(total).sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("A", "B"),
    [((2, 3), (3, 5)), ((3,), (5,)), ((4, 2, 3), (2, 5)), ((1, 1, 2, 3), (1, 1, 2, 5))],
)
def test_factors_that_do_not_fit_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(EditError, match="leading axes"):
        LayerUpdate(torch.zeros(A), torch.zeros(B))


@pytest.mark.parametrize(
    "other", [layer_update(2, 5, 4), layer_update(2, 4, 3), layer_update(2, 5, 3, lead=(2,))]
)
def test_changes_of_other_matrices_do_not_add_up(other: LayerUpdate) -> None:
    with pytest.raises(EditError, match="do not add up"):
        LayerUpdate.sum((layer_update(2, 5, 3), other))


# Gates


def gated(seed: int, rank: int = 3, lead: tuple[int, ...] = ()) -> LayerUpdate:
    thresholds = draw(*lead, rank, seed=seed + 5).abs()
    return replace(layer_update(rank, 5, 4, seed, lead), threshold=thresholds)


def effect(layer: LayerUpdate, inputs: Tensor) -> Tensor:
    """What an unbatched change adds for each row of inputs, term by term."""
    added = torch.zeros(len(inputs), layer.B.shape[-1], dtype=inputs.dtype)
    for A, B, threshold in zip(layer.A, layer.B, layer.thresholds(), strict=True):
        added += torch.outer(softshrink(inputs @ A, threshold.item()), B)
    return layer.scale * added


@laws
@given(st.integers(0, 100))
def test_a_gated_term_acts_beyond_its_threshold(seed: int) -> None:
    layer, inputs = gated(seed), draw(7, 4, seed=seed + 9)
    expected = effect(layer, inputs)
    assert not torch.allclose(expected, inputs @ layer.dense().mT)
    for same_change in (layer, layer.folded(), -(layer * -1.0), layer.map(Tensor.clone)):
        assert_close(same_change.apply(inputs), expected)


def test_below_every_threshold_nothing_is_added() -> None:
    layer, inputs = gated(1), draw(7, 4, seed=2)
    limit = (inputs @ layer.A.mT).abs().amax(0)
    assert not replace(layer, threshold=limit).apply(inputs).any()


def test_a_gate_at_zero_is_no_gate_to_the_bit() -> None:
    layer, inputs = layer_update(3, 5, 4), draw(7, 4, seed=2)
    at_zero = replace(layer, threshold=layer.thresholds())
    assert torch.equal(at_zero.apply(inputs), layer.apply(inputs))


def test_gated_and_plain_changes_add_up() -> None:
    parts, inputs = (gated(1), layer_update(2, 5, 4, seed=3), gated(4)), draw(7, 4, seed=2)
    expected = sum(effect(part, inputs) for part in parts)
    assert_close(LayerUpdate.sum(parts).apply(inputs), expected)


def test_each_sequence_has_its_own_gates() -> None:
    one, plain, two = gated(1), layer_update(2, 5, 4, seed=3), gated(4, rank=1)
    inputs = draw(4, 7, 4, seed=2)
    stacked = stack_sequences([Update({"a": one}), None, Update({"a": plain}), Update({"a": two})])
    expected = effect(one, inputs[0]), torch.zeros(7, 5, dtype=inputs.dtype)
    expected += effect(plain, inputs[2]), effect(two, inputs[3])
    assert stacked.gated
    assert_close(stacked["a"].apply(inputs), torch.stack(expected))


def test_a_sum_is_gated_where_a_part_is() -> None:
    plain, other, one = layer_update(1, 5, 4, seed=1), layer_update(1, 5, 4, seed=2), gated(3)
    assert LayerUpdate.sum((plain, other)).threshold is None
    assert not Update({"a": plain, "b": other}).gated
    assert Update({"a": plain, "b": one}).gated
    assert LayerUpdate.sum((plain, one, other)).threshold is not None


def test_what_a_gated_change_cannot_be_is_refused() -> None:
    with pytest.raises(EditError, match="cannot be compressed"):
        gated(1).compress(2)
    with pytest.raises(EditError, match=r"one threshold a term, \(3,\); got \(2,\)"):
        replace(layer_update(3, 5, 4), threshold=torch.zeros(2))


def test_a_threshold_that_is_not_finite_is_seen() -> None:
    layer = gated(1)
    assert Update({"a": layer}).is_finite()
    assert not Update({"a": replace(layer, threshold=layer.thresholds() / 0)}).is_finite()


@pytest.mark.parametrize("rank", [0, -1])
def test_compression_to_no_term_is_refused(rank: int) -> None:
    with pytest.raises(EditError, match="at least 1"):
        update(1).compress(rank)


def test_a_batch_without_any_update_is_refused() -> None:
    with pytest.raises(EditError, match="None of the sequences"):
        stack_sequences([None, Update({})])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_update_takes_the_bytes_of_its_factors_and_thresholds(dtype: torch.dtype) -> None:
    bytes_each = {torch.float64: 8, torch.bfloat16: 2}[dtype]
    plain, one = layer_update(2, 5, 3), gated(1, rank=3)
    assert Update({"a": plain}).to(dtype).nbytes == bytes_each * 2 * (3 + 5)
    both = Update({"a": plain, "b": one}).to(dtype)
    assert both.nbytes == bytes_each * (2 * (3 + 5) + 3 * (4 + 5 + 1))
