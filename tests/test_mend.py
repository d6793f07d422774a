"""Laws of the MEND editor: what a fresh one is, what each setting changes, what it leaves alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, language_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.editors.base import TrainableEditor
from workbench.editors.mend import Mend, MendConfig
from workbench.editors.networks import EditorNetwork
from workbench.editors.proposals import EditRequest, gradient_factors
from workbench.encoding import collate, tokenize
from workbench.errors import EditError, EditorError
from workbench.factors import Factors, capture
from workbench.files import write_tensors
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.views import target_logits

torch.set_num_threads(1)
# Conv1D and Linear; two stacks of one shape and of two; a classifier.
KINDS = ["gpt2", "llama", "t5", "bart", "bert"]
kinds = pytest.mark.parametrize("family", KINDS)
opened = cache(language_model)


def requests(lm: LanguageModel) -> list[EditRequest]:
    targets = ["LABEL_1", "LABEL_0"] if lm.kind == "classifier" else ["Lyon", "a much longer one"]
    prompts = ["The capital of France is", "Her name was"]
    return [EditRequest(*pair) for pair in zip(prompts, targets, strict=True)]


def editor_for(family: str, **config: object) -> Mend:
    """An editor that has gathered statistics and is otherwise fresh."""
    lm = opened(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        editor = Mend(lm, MendConfig(**({"rank": 4, "edit_lr": 0.01} | config))).eval()  # type: ignore[arg-type]
    editor.transform(factors_of(editor), gather=True)
    return editor


def stirred(editor: Mend) -> Mend:
    """The editor with all its parameters moved, as if trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            spread = 0.3 * parameter.abs().mean() + 0.01
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return editor


def factors_of(editor: Mend) -> dict[str, Factors]:
    return gradient_factors(editor.lm, editor.layers, requests(editor.lm))[1]


def network_of(editor: Mend) -> dict[str, EditorNetwork]:
    """Layer name -> its network."""
    found = {}
    for key, group in editor.groups.items():
        network = editor.networks[key]
        assert isinstance(network, EditorNetwork)
        found |= {layer.name: network for layer in group}
    return found


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest number."""
    atol = tolerance * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, check_dtype=False)


# What a fresh editor does


@kinds
@pytest.mark.parametrize("shared", [True, False])
def test_fresh_editor_returns_the_normalised_factors(family: str, shared: bool):
    editor = editor_for(family, shared=shared)
    factors = factors_of(editor)
    pseudofactors = editor.transform(factors)
    assert list(pseudofactors) == [layer.name for layer in editor.layers]
    for group in editor.groups.values():
        for side in ("activation", "delta"):
            live = {layer.name: factors[layer.name].live() for layer in group}
            rows = [getattr(factors[name], side)[mask].numpy() for name, mask in live.items()]
            seen = np.concatenate(rows).astype(np.float64)
            for (name, mask), mine in zip(live.items(), rows, strict=True):
                wanted = (mine - seen.mean(0)) / (seen.std(0, ddof=1) + 1e-7)
                found = getattr(pseudofactors[name], side)
                # Where a dimension hardly varies, float32's rounding of the mean counts.
                torch.testing.assert_close(
                    found[mask], torch.tensor(wanted), rtol=1e-4, atol=1e-4, check_dtype=False
                )
                assert not found[~mask].any()


def dense_gradients(family: str) -> dict[str, Tensor]:
    """Layer name -> autograd's gradient of the summed losses, (out, in), on another copy."""
    model = FAMILIES[family]()
    model.requires_grad_(True)
    lm = opened(family)
    total = torch.zeros(())
    for request in requests(lm):
        tokens, _ = gradient_factors(lm, lm.layers(), [request])
        batch = collate(lm, tokens)
        logits = model(**batch.inputs).logits
        picked = logits if lm.kind == "classifier" else logits[batch.rows, batch.columns]
        total = total + cross_entropy(picked, batch.targets)
    total.backward()
    found = {}
    for layer in lm.layers():
        gradient = model.get_submodule(layer.name).weight.grad
        assert isinstance(gradient, Tensor)
        found[layer.name] = gradient.T if layer.transposed else gradient
    return found


@kinds
@pytest.mark.parametrize(("ascent", "sign"), [(False, -1), (True, 1)])
def test_identity_without_normaliser_is_a_gradient_step(family: str, ascent: bool, sign: int):
    editor = editor_for(family, normalize=False, ascent=ascent)
    update = editor.propose(requests(editor.lm)).update
    for name, gradient in dense_gradients(family).items():
        same(update[name].dense(), sign * 0.01 * gradient)


def test_untrained_editor_says_so():
    editor = Mend(opened("gpt2"), MendConfig(rank=4))
    for mode in (editor.train(), editor.eval()):
        with pytest.raises(EditorError, match=r"never trained.*editor='ft'"):
            mode.propose(requests(editor.lm))


# What propose returns


@kinds
def test_rows_without_gradient_stay_zero(family: str):
    editor = stirred(editor_for(family))
    factors = factors_of(editor)
    pseudofactors = editor.transform(factors)
    dead = [~factors[layer.name].live() for layer in editor.layers]
    assert all(mask.any() for mask in dead)  # the shorter request is padded
    for layer, mask in zip(editor.layers, dead, strict=True):
        for side in (pseudofactors[layer.name].activation, pseudofactors[layer.name].delta):
            assert not side[mask].any()
            assert side[~mask].any(-1).all()


@kinds
def test_propose_is_the_batched_update_without_its_dead_rows(family: str):
    editor = stirred(editor_for(family))
    proposal = editor.propose(requests(editor.lm))
    factors = factors_of(editor)
    with torch.no_grad():
        batched = editor.update(editor.transform(factors), factors)
    assert list(proposal.update) == [layer.name for layer in editor.layers]
    for index, (name, layer) in enumerate(proposal.update.items()):
        live = factors[name].live()
        assert layer.rank == int(live.sum())
        assert torch.equal(layer.A, batched[name].A[live])
        assert torch.equal(layer.B, batched[name].B[live])
        assert layer.scale == -editor.edit_lrs[index].item() == -proposal.edit_lrs[name]
        same(layer.dense(), batched[name].dense().sum(0))
    assert proposal.pseudofactors is not None
    assert proposal.factors.keys() == proposal.pseudofactors.keys() == proposal.update.keys()
    assert len(proposal.tokens) == 2


@kinds
def test_edits_in_a_batch_are_their_rows_side_by_side(family: str):
    editor = stirred(editor_for(family))
    together = editor.propose(requests(editor.lm)).update
    apart = [editor.propose([request]).update for request in requests(editor.lm)]
    for name, layer in together.items():
        same(layer.A, torch.cat([update[name].A for update in apart]), 1e-4)
        same(layer.B, torch.cat([update[name].B for update in apart]), 1e-4)


def test_no_request_is_refused():
    with pytest.raises(EditError, match="nothing to edit"):
        editor_for("gpt2").propose([])


# What each setting changes


def test_shared_layers_have_one_network_a_shape():
    editor = editor_for("t5")
    assert {key: len(group) for key, group in editor.groups.items()} == {"32x48": 4, "48x32": 4}
    assert editor.networks.keys() == editor.groups.keys()


def test_unshared_layers_have_a_network_each():
    editor = editor_for("t5", shared=False)
    assert all(len(group) == 1 for group in editor.groups.values())
    assert len(editor.networks) == len(editor.layers)


def test_layers_that_share_a_network_differ_by_scale_and_offset():
    editor = editor_for("llama", normalize=False)
    group = editor.groups["32x48"]
    one = factors_of(editor)[group[0].name]
    parts = [one] * len(group)
    network = network_of(editor)[group[0].name]
    assert torch.equal(*(part.delta for part in network.transform(parts, False)[:2]))
    with torch.no_grad():
        network.get_parameter("blocks.0.offset")[1] += 1
    moved = network.transform(parts, False)
    assert torch.equal(moved[0].delta, moved[2].delta)
    assert not torch.equal(moved[0].delta, moved[1].delta)


@pytest.mark.parametrize("inputs", ["both", "activation", "delta", "smaller"])
def test_inputs_decide_what_the_networks_change(inputs: str):
    fresh, editor = editor_for("gpt2", inputs=inputs), stirred(editor_for("gpt2", inputs=inputs))
    factors = factors_of(editor)
    before, after = fresh.transform(factors), editor.transform(factors)
    for layer in editor.layers:
        smaller = "activation" if layer.in_features < layer.out_features else "delta"
        changed = {"both": {"activation", "delta"}, "smaller": {smaller}}.get(inputs, {inputs})
        for side in ("activation", "delta"):
            equal = torch.equal(*(getattr(p[layer.name], side) for p in (before, after)))
            assert equal == (side not in changed)
        widths = {"activation": layer.in_features, "delta": layer.out_features}
        bias = network_of(editor)[layer.name].get_parameter("blocks.0.bias")
        assert len(bias) == sum(widths[side] for side in changed)


def test_no_residual_path_without_identity():
    editor = editor_for("gpt2", identity=False)
    factors, fresh = factors_of(editor), editor_for("gpt2").transform(factors_of(editor))
    for name, part in editor.transform(factors).items():
        assert not torch.allclose(part.activation, fresh[name].activation)
        assert (part.activation >= 0).all()
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.zero_()
    assert not any(p.activation.any() or p.delta.any() for p in editor.transform(factors).values())


def test_a_gate_keeps_a_share_of_each_terms_match_with_its_own_input():
    editor = stirred(editor_for("llama", gate=0.25))
    factors = factors_of(editor)
    update = editor.update(editor.transform(factors), factors)
    assert editor.gate_logits is not None
    for logit, (name, layer) in zip(editor.gate_logits, update.items(), strict=True):
        live = factors[name].live()
        A, own = layer.A[live], factors[name].activation[live]
        same(layer.thresholds()[live], logit.sigmoid() * (A * own).sum(-1).abs())
        assert not layer.thresholds()[~live].any()


def test_a_proposal_tells_the_layers_steps_and_gates():
    gated, plain = (
        editor.propose(requests(editor.lm))
        for editor in (editor_for("llama", gate=0.25), editor_for("llama"))
    )
    assert plain.gates == {}
    assert gated.gates == pytest.approx(dict.fromkeys(gated.update, 0.25))
    assert gated.edit_lrs == plain.edit_lrs == pytest.approx(dict.fromkeys(plain.update, 0.01))


def test_a_gate_starts_at_its_share():
    gate_logits = editor_for("llama", gate=0.25).gate_logits
    assert gate_logits is not None
    same(gate_logits.sigmoid(), torch.full_like(gate_logits, 0.25))
    assert editor_for("llama").gate_logits is None


def test_a_gate_is_put_on_what_has_been_learned_and_taken_off():
    editor = stirred(editor_for("llama"))
    gated, factors = editor.changed(gate=0.25), factors_of(editor)
    ours, theirs = (e.update(e.transform(factors), factors) for e in (editor, gated))
    assert theirs.gated
    free = gated.changed(gate=0.0)
    assert free.gate_logits is None
    again = free.update(free.transform(factors), factors)
    assert all(torch.equal(again[name].B, layer.B) for name, layer in ours.items())
    for name, layer in theirs.items():
        assert torch.equal(layer.dense(), ours[name].dense())


def test_what_has_been_learned_serves_any_number_of_rounds():
    editor = stirred(editor_for("llama"))
    changed = editor.changed(rounds=3, later_strength=0.5)
    assert changed.config == replace(editor.config, rounds=3, later_strength=0.5)
    for name, tensor in editor.state_dict().items():
        assert torch.equal(tensor, changed.state_dict()[name])


@kinds
def test_whole_targets_are_edited_with_the_gradient_of_their_sum(family: str):
    editor = editor_for(family, sum_tokens=True)
    for request in requests(editor.lm):
        made = editor.propose([request])
        batch = collate(editor.lm, made.tokens)
        with capture(editor.layers) as tap:
            logits = target_logits(editor.lm, batch)
            whole = tap.factors(cross_entropy(logits, batch.targets, reduction="sum"))
        for name, factors in made.factors.items():
            same(factors.activation, whole[name].activation)
            same(factors.delta, whole[name].delta)


def test_an_editor_of_other_losses_gathers_its_statistics_anew():
    editor = stirred(editor_for("llama"))
    changed = editor.changed(sum_tokens=True)
    assert editor.trained
    assert not changed.trained
    assert changed.config == replace(editor.config, sum_tokens=True)
    for name, parameter in editor.named_parameters():
        assert torch.equal(parameter, changed.get_parameter(name))


@pytest.mark.parametrize("setting", [{"rank": 8}, {"shared": False}, {"gate": 0.5}])
def test_what_has_been_learned_fits_no_other_settings(setting: dict[str, Any]):
    editor = editor_for("llama", gate=0.3)
    with pytest.raises(EditorError, match=f"cannot go on with .*{next(iter(setting))}"):
        editor.changed(**setting)


def probabilities(lm: LanguageModel, request: EditRequest) -> Tensor:
    """Of each token of the target, `(tokens,)`."""
    batch = collate(lm, [tokenize(lm, request.prompt, request.target)])
    return target_logits(lm, batch).softmax(-1).gather(1, batch.targets[:, None])[:, 0]


@kinds
def test_later_rounds_edit_what_the_edited_model_is_not_sure_of(family: str):
    once, twice = (
        editor_for(family, rounds=rounds, normalize=False, edit_lr=0.05, later_strength=0.5)
        for rounds in (1, 2)
    )
    lm, asked = once.lm, requests(once.lm)
    first = once.propose(asked)
    with overlay(lm.model, first.update):
        left = [request for request in asked if probabilities(lm, request).min() < 0.5]
        again = once.propose(left)
    made = twice.propose(asked)
    for name, layer in made.update.items():
        same(layer.dense(), first.update[name].dense() + 0.5 * again.update[name].dense())
    assert made.tokens == (*first.tokens, *again.tokens)
    # A proposal's update is what its pseudofactors add up to, however many rounds they are of.
    assert made.pseudofactors
    for name, sides in made.pseudofactors.items():
        same(made.update[name].dense(), -made.edit_lrs[name] * sides.gradient())


def test_an_edit_ends_where_the_model_is_sure_enough():
    settings = {"rounds": 3, "normalize": False, "edit_lr": 1e-3}
    request = EditRequest("The capital of France is", "Lyon")
    with torch.no_grad():
        least = probabilities(opened("llama"), request).min().item()
    for confidence, rounds in ((0.9 * least, 1), (0.5, 3)):
        editor = editor_for("llama", confidence=confidence, **settings)
        assert editor.propose([request]).tokens == rounds * (
            tokenize(editor.lm, request.prompt, request.target),
        )


def test_a_round_that_does_not_lower_the_loss_is_taken_back():
    request, settings = EditRequest("The capital of France is", "Lyon"), {"normalize": False}
    once, uphill = (editor_for("llama", ascent=True, rounds=n, **settings) for n in (1, 5))
    ours, theirs = uphill.propose([request]), once.propose([request])
    assert ours.tokens == theirs.tokens
    for name, layer in ours.update.items():
        same(layer.dense(), theirs.update[name].dense())


def test_after_a_round_that_was_taken_back_the_next_acts_half_as_strongly():
    request, settings = EditRequest("The capital of France is", "Lyon"), {"normalize": False}
    once = editor_for("t5", edit_lr=3.0, **settings)
    first = once.propose([request]).update
    with overlay(once.lm.model, first):
        second = once.propose([request]).update

    def loss(strength: float) -> float:
        with overlay(once.lm.model, first + second * strength):
            return -probabilities(once.lm, request).log().mean().item()

    start = next(s for s in (2.0**k for k in range(20)) if loss(s) >= loss(0) > loss(s / 2))
    for rounds, made in ((2, first), (3, first + second * (start / 2))):
        editor = editor_for("t5", edit_lr=3.0, rounds=rounds, later_strength=start, **settings)
        for name, layer in editor.propose([request]).update.items():
            same(layer.dense(), made[name].dense())


def test_ascent_reverses_the_update():
    descent, ascent = (
        stirred(editor_for("gpt2", ascent=up)).propose(requests(opened("gpt2"))).update
        for up in (False, True)
    )
    for name, layer in descent.items():
        assert torch.equal(layer.dense(), -ascent[name].dense())


def test_start_of_V():
    for unit, spread in ((True, 1.0), (False, (2 / (160 + 160)) ** 0.5)):
        editor = editor_for("gpt2", rank=1920, unit_v=unit)
        for name, parameter in editor.networks.named_parameters():
            if name.endswith("V"):
                assert parameter.shape == (160, 160)  # the rank is at most the width
                assert parameter.std().item() == pytest.approx(spread, rel=0.05)
            if name.endswith("U"):
                assert not parameter.any()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"blocks": [1, -1], "matrices": ["c_fc"], "rank": 2},
        {"blocks": ("decoder:1",), "shared": False, "identity": False},
        {"blocks": {"decoder": [2]}, "matrices": "attention", "inputs": "smaller"},
        {"normalize": False, "ascent": True, "unit_v": True, "inputs": "delta"},
        {"gate": 0.5},
    ],
)
def test_settings_are_json_and_make_the_same_editor(config: dict):
    editor = editor_for("gpt2", **config)
    settings = json.loads(json.dumps(editor.settings()))
    twin = Mend.from_settings(editor.lm, settings)
    assert json.loads(json.dumps(twin.settings())) == settings
    assert [layer.name for layer in twin.layers] == [layer.name for layer in editor.layers]
    shapes = [{k: v.shape for k, v in e.state_dict().items()} for e in (editor, twin)]
    assert shapes[0] == shapes[1]
    twin.load_state_dict(editor.state_dict())
    pair = [e.propose(requests(e.lm)).update.dense() for e in (editor, twin)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(EditorError, match="rank must be at least 1; got 0"):
        MendConfig(rank=0)
    with pytest.raises(EditorError, match="rounds must be at least 1; got 0"):
        MendConfig(rounds=0)
    with pytest.raises(EditorError, match=r"0 \(no gate\) to below 1; got 1.0"):
        MendConfig(gate=1.0)
    with pytest.raises(EditorError, match=r"both, activation, delta, smaller; got 'u'"):
        MendConfig(inputs="u")  # type: ignore[arg-type]


# Running statistics


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=2),
    cuts=st.lists(st.integers(0, 40)),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_statistics_are_those_of_all_rows_however_batched(rows, cuts, scale):
    network = EditorNetwork(3, 3, 1, MendConfig(rank=1))
    array = np.array(rows) * scale + scale
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for first, last in pairwise(edges):
        part = torch.tensor(array[None, first:last])
        network.gather(part, -part, torch.ones(1, last - first, dtype=torch.bool))
    assert network.rows_seen == len(rows)
    for statistics, seen in ((network.activation_stats, array), (network.delta_stats, -array)):
        atol = 1e-9 * np.abs(array).max()
        np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=0, atol=atol)
        np.testing.assert_allclose(statistics.std(), seen.std(0, ddof=1), rtol=0, atol=atol)


def test_statistics_leave_out_dead_rows():
    editor = editor_for("llama")
    factors = factors_of(editor)
    for group in editor.groups.values():
        live = sum(int(factors[layer.name].live().sum()) for layer in group)
        assert network_of(editor)[group[0].name].rows_seen == live


# Files


@kinds
@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_saved_editor_makes_the_same_update_to_the_bit(family: str, gate: float, tmp_path: Path):
    editor = stirred(editor_for(family, gate=gate))
    editor.card = {"data": "none"}
    assert editor.save_pretrained(tmp_path) == tmp_path
    loaded = TrainableEditor.from_pretrained(tmp_path, editor.lm)
    assert isinstance(loaded, Mend)
    assert loaded.card == {"data": "none"}
    ours, theirs = (e.propose(requests(e.lm)).update for e in (editor, loaded))
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert torch.equal(layer.A, theirs[name].A)
        assert torch.equal(layer.B, theirs[name].B)
        assert torch.equal(layer.thresholds(), theirs[name].thresholds())
        assert layer.scale == theirs[name].scale
        assert bool(layer.thresholds().any()) == bool(gate)
    about = json.loads((tmp_path / "editor.json").read_text())
    assert about["layers"] == [layer.name for layer in editor.layers]
    assert (about["editor"], about["settings"]["rank"]) == ("mend", 4)


def test_other_base_weights_are_warned_of(tmp_path: Path):
    editor_for("gpt2").save_pretrained(tmp_path)
    model = FAMILIES["gpt2"]()
    other = LanguageModel.wrap(model, tiny_tokenizer(), "another")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainableEditor.from_pretrained(tmp_path, other)  # other object, same weights
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.warns(UserWarning, match="trained over tiny-gpt2 with weights"):
        TrainableEditor.from_pretrained(tmp_path, other)


def test_editor_of_another_model_is_refused(tmp_path: Path):
    editor_for("gpt2").save_pretrained(tmp_path)
    with pytest.raises(EditorError, match=r"trained for tiny-gpt2 and does not fit tiny-llama"):
        TrainableEditor.from_pretrained(tmp_path, opened("llama"))
    editor_for("llama").save_pretrained(tmp_path)
    with pytest.raises(EditorError, match=r"does not fit tiny-qwen2_moe"):
        TrainableEditor.from_pretrained(tmp_path, opened("qwen2_moe"))


def test_missing_and_damaged_editors_are_refused(tmp_path: Path):
    lm = opened("gpt2")
    with pytest.raises(EditorError, match="There is no file"):
        TrainableEditor.from_pretrained(tmp_path / "nowhere", lm)
    path = editor_for("gpt2").save_pretrained(tmp_path) / "editor.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EditorError, match="damaged or no safetensors file"):
        TrainableEditor.from_pretrained(tmp_path, lm)


@pytest.mark.parametrize("missing", ["editor", "settings", "layers", "base_fingerprint", "card"])
def test_files_that_hold_no_editor_are_refused(missing: str, tmp_path: Path):
    lm, editor = opened("gpt2"), editor_for("gpt2")
    path = editor.save_pretrained(tmp_path) / "editor.safetensors"
    about = json.loads((tmp_path / "editor.json").read_text())
    del about[missing]
    for metadata in ({"about": json.dumps(about)}, {"about": "[]"}, {"about": "{"}, {}):
        write_tensors(path, editor.state_dict(), metadata)
        with pytest.raises(EditorError, match="holds no editor that this version can read"):
            TrainableEditor.from_pretrained(tmp_path, lm)


def test_unknown_editors_tensors_and_settings_are_refused(tmp_path: Path):
    lm, editor = opened("gpt2"), editor_for("gpt2")
    path = editor.save_pretrained(tmp_path) / "editor.safetensors"
    about = json.loads((tmp_path / "editor.json").read_text())
    tensors = editor.state_dict()
    write_tensors(path, tensors, {"about": json.dumps(about | {"editor": "rune"})})
    with pytest.raises(EditorError, match=r"no editor 'rune'\. Editors: .*mend"):
        TrainableEditor.from_pretrained(tmp_path, lm)
    write_tensors(path, tensors, {"about": json.dumps(about | {"editor": "rome"})})
    with pytest.raises(EditorError, match="'rome', an editor without parameters"):
        TrainableEditor.from_pretrained(tmp_path, lm)
    write_tensors(path, tensors, {"about": json.dumps(about | {"settings": {"rang": 4}})})
    with pytest.raises(EditorError, match="rang"):
        TrainableEditor.from_pretrained(tmp_path, lm)
    del tensors["edit_lrs"]
    write_tensors(path, tensors, {"about": json.dumps(about)})
    with pytest.raises(EditorError, match="edit_lrs"):
        TrainableEditor.from_pretrained(tmp_path, lm)


# What an edit leaves alone


@contextmanager
def untouched(editor: Mend) -> Iterator[None]:
    """The model, the editor and the global random state are after the block as before it."""
    model = editor.lm.model

    def state() -> tuple:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        grads = [p.grad for p in (*model.parameters(), *editor.parameters())]
        wanted = [p.requires_grad for p in model.parameters()]
        random = torch.get_rng_state().tolist()
        return editor.lm.checksum(), hooks, grads, wanted, model.training, random

    before, tensors = state(), {k: v.clone() for k, v in editor.state_dict().items()}
    yield
    assert state() == before
    assert all(torch.equal(v, tensors[k]) for k, v in editor.state_dict().items())


@kinds
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_propose_leaves_no_trace(family: str, mode: str):
    editor = getattr(stirred(editor_for(family)), mode)()
    with untouched(editor):
        editor.propose(requests(editor.lm))


@kinds
def test_a_failed_proposal_leaves_no_trace(family: str):
    editor = stirred(editor_for(family))

    def fail(*_: object) -> None:
        raise RuntimeError("the last block fails")

    handle = editor.lm.stacks[-1].blocks[-1].register_forward_hook(fail)
    with untouched(editor), pytest.raises(RuntimeError, match="the last block fails"):
        editor.propose(requests(editor.lm))
    handle.remove()
    with untouched(editor), pytest.raises(EditError):
        editor.propose([*requests(editor.lm), EditRequest("A prompt without", " ")])


def test_a_model_that_is_not_finite_is_refused():
    editor = stirred(editor_for("gpt2"))
    lm = language_model("gpt2")
    with torch.no_grad():
        next(lm.model.parameters()).fill_(float("nan"))
    broken = Mend(lm, editor.config)
    broken.load_state_dict(editor.state_dict())
    with pytest.raises(EditError, match="loss on this edit is nan"):
        broken.propose(requests(lm))
