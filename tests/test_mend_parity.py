"""The arithmetic of the published MEND implementation, number by number.

`fixtures/mend_parity.npz` holds what that implementation computes in float32. A: the network of one
shape alone. B: 21 iterations of meta-training over a tiny Llama, then an edit of two records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from families import tiny_tokenizer
from torch import Tensor

from workbench.data import EditExample
from workbench.editors.mend import Mend, MendConfig
from workbench.editors.networks import EditorNetwork
from workbench.encoding import Batch, Tokens, collate
from workbench.factors import Factors, capture
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.training import EditTexts, MetaStep, StepLosses, Trainer, TrainingConfig
from workbench.updates import LayerUpdate, Update
from workbench.views import target_logits

torch.set_num_threads(1)
PUBLISHED = np.load(Path(__file__).parent / "fixtures" / "mend_parity.npz")
PARAMETERS = {
    "u": "U",
    "v": "V",
    "bias": "bias",
    "mode_scale.weight": "scale",
    "mode_shift.weight": "offset",
}


def published(key: str) -> Tensor:
    return torch.tensor(PUBLISHED[key])


def parameters(prefix: str) -> dict[str, Tensor]:
    """What is stored under a prefix, by the names that it has in our networks."""
    found = {}
    for key in PUBLISHED.files:
        if key.startswith(prefix) and "mlp.layers." in key:
            shape, _, rest = key.removeprefix(prefix).partition("mlp.layers.")
            block, _, name = rest.partition(".")
            network = f"networks.{shape[1:-2].replace(', ', 'x')}." if shape else ""
            found[f"{network}blocks.{block}.{PARAMETERS[name]}"] = published(key)
    return found


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5 of the largest number compared; where all are 0, to float32's rounding."""
    atol = 1e-5 * max(theirs.abs().max().item(), 1e-2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize(("case", "rank"), [("A", 4), ("A_rankcap", 1920), ("A_init", 4)])
def test_network_of_one_shape(case: str, rank: int):
    network = EditorNetwork(7, 5, 3, MendConfig(rank=rank))
    missing, unexpected = network.load_state_dict(parameters(f"{case}/w/"), strict=False)
    assert not unexpected
    assert all("_stats." in name for name in missing)
    for call in ("train0", "train1", "train2", "eval3"):
        stored = {key: published(f"{case}/{call}/{key}") for key in ("u", "delta", "coef", "mode")}
        mode = int(stored["mode"])
        # One layer's rows at a time: those of the other two are dead.
        activation, delta = torch.zeros(3, 12, 7), torch.zeros(3, 12, 5)
        activation[mode], delta[mode] = stored["u"].flatten(0, 1), stored["delta"].flatten(0, 1)
        live = (activation != 0).any(-1) & (delta != 0).any(-1)
        if call.startswith("train"):
            network.gather(activation, delta, live)
        pseudo = [part[mode][live[mode]] for part in network(activation, delta)]
        update = LayerUpdate(*pseudo, scale=published("A/lr")).dense()
        network.zero_grad()
        (update * stored["coef"]).sum().backward()

        close(pseudo[0], published(f"{case}/{call}/u_tilde"))
        close(pseudo[1], published(f"{case}/{call}/delta_tilde"))
        close(update, published(f"{case}/{call}/update"))
        for name, gradient in parameters(f"{case}/{call}/grad/").items():
            found = network.get_parameter(name).grad
            assert found is not None
            close(found, gradient)
        for side, statistics in (("u", network.activation_stats), ("v", network.delta_stats)):
            close(statistics.mean, published(f"{case}/{call}/{side}_mean"))
            close(statistics.squares, published(f"{case}/{call}/{side}_s"))
            close(statistics.std(), published(f"{case}/{call}/{side}_std"))
            assert statistics.count == published(f"{case}/{call}/k")


def llama() -> LanguageModel:
    config = hf.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    model = hf.LlamaForCausalLM(config)
    prefix = "B/model/"
    names = [key.removeprefix(prefix) for key in PUBLISHED.files if key.startswith(prefix)]
    model.load_state_dict({name: published(prefix + name) for name in names})
    return LanguageModel.wrap(model, tiny_tokenizer())


def layer_by_layer(network: EditorNetwork) -> None:
    """Make a network normalise each layer's rows before it has seen those of the next layer.

    That is the published order. Ours merges all layers' rows first; what has been merged after an
    iteration is the same, what the iteration normalises by is not.
    """
    together = network.transform

    def transform(parts: Sequence[Factors], gather: bool) -> list[Factors]:
        dead = [Factors(torch.zeros_like(p.activation), torch.zeros_like(p.delta)) for p in parts]
        return [
            together([*dead[:mode], part, *dead[mode + 1 :]], gather)[mode]
            for mode, part in enumerate(parts)
        ]

    network.transform = transform


def untrained() -> Mend:
    config = MendConfig(rank=8, blocks=[1, 2, 3], edit_lr=1e-2, ascent=True, unit_v=True)
    editor = Mend(llama(), config)
    torch.testing.assert_close(editor.edit_lrs.data, published("B/edit_lrs0"))
    _, unexpected = editor.load_state_dict(parameters("B/editor0/"), strict=False)
    assert not unexpected
    for network in editor.networks.values():
        layer_by_layer(network)  # type: ignore[arg-type]
    return editor


def records(key: str) -> list[Tokens]:
    """Stored records as tokens: what carries a label is to be predicted."""
    found = []
    stored = (published(f"B/{key}/{name}") for name in ("input_ids", "attention_mask", "labels"))
    for ids, mask, labels in zip(*stored, strict=True):
        kept = ids[mask.bool()].tolist()
        targets = labels[labels != -100].tolist()
        assert kept[len(kept) - len(targets) :] == targets
        found.append(Tokens(tuple(kept[:-1]), tuple(targets)))
    return found


def watched(key: str) -> list[Tokens]:
    """Stored locality records. The published KL is a mean over all tokens of all records.

    Ours is a mean of means: it is the same number if each record comes as often as it has tokens.
    """
    found = []
    for ids, mask in zip(
        published(f"B/{key}/input_ids"), published(f"B/{key}/attention_mask"), strict=True
    ):
        kept = tuple(ids[mask.bool()].tolist())
        found += [Tokens(kept, kept)] * len(kept)  # the KL is taken wherever a target stands
    return found


class StoredBatches:
    """The stored iterations, where the trainer expects its sampler."""

    def batch(self, step: int) -> list[EditTexts]:
        key = f"it{step}"
        (edit,) = records(f"{key}/edit_inner")
        equivalents, locality = records(f"{key}/edit_outer"), watched(f"{key}/loc")
        return [EditTexts(edit, tuple(equivalents), tuple(locality))]


CONFIG = TrainingConfig(
    steps=2,
    batch=1,
    accumulate=10,
    late_first_step=True,
    lr=1e-3,
    one_alpha_optimizer=True,
    c_edit=0.1,
    clip=100.0,
)


class RecordedStep(MetaStep):
    """A meta-training step that keeps its losses."""

    def __init__(self, editor: Mend, config: TrainingConfig) -> None:
        super().__init__(editor, config)
        self.seen: list[StepLosses] = []

    def losses(self, *args, **kwargs) -> StepLosses:
        self.seen.append(super().losses(*args, **kwargs))
        return self.seen[-1]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    editor, folder = untrained(), tmp_path_factory.mktemp("parity")
    alphas = []
    trainer = Trainer(
        editor,
        [EditExample(prompt="never", target="drawn")],
        (),
        CONFIG,
        folder,
        on_step=lambda progress, losses: alphas.append(editor.edit_lrs.detach().clone()),
    )
    trainer.sampler = StoredBatches()  # type: ignore[assignment]
    trainer.meta = meta = RecordedStep(editor, CONFIG)
    trainer.run(bar=False)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    norms = [record["gradient_norm"] for record in log]
    return SimpleNamespace(editor=editor, losses=meta.seen, norms=norms, alphas=alphas)


def test_order_of_layers():
    stored = [
        key.removeprefix("B/eval/update/").removesuffix(".weight")
        for key in PUBLISHED.files
        if key.startswith("B/eval/update/")
    ]
    assert [layer.name for layer in untrained().layers] == stored


def test_gradient_of_the_first_iteration():
    editor = untrained().train()
    MetaStep(editor, CONFIG).losses(StoredBatches().batch(0))
    gradients = {name: p.grad / 10 for name, p in editor.named_parameters() if p.grad is not None}
    for name, gradient in parameters("B/grad_it0/").items():
        close(gradients[name], gradient)
    close(gradients["edit_lrs"], published("B/grad_it0/edit_lrs"))


def test_losses_of_every_iteration(training: SimpleNamespace):
    ours = [[losses.edit, losses.locality, losses.total] for losses in training.losses]
    close(torch.tensor(ours), published("B/losses")[:, :3])


def test_gradient_norms(training: SimpleNamespace):
    close(torch.tensor(training.norms), published("B/losses")[[10, 20], 3])


def test_alphas(training: SimpleNamespace):
    trajectory = published("B/edit_lrs_traj")
    assert (trajectory[:10] == published("B/edit_lrs0")).all()
    close(torch.stack(training.alphas), trajectory[[10, 20]])


def test_editor_after_training(training: SimpleNamespace):
    for name, value in parameters("B/editor_end/").items():
        close(training.editor.get_parameter(name), value)


def test_statistics_after_training(training: SimpleNamespace):
    for shape, network in training.editor.networks.items():
        prefix = f"B/stats_end/({shape.replace('x', ', ')})."
        for side, statistics in (("u", network.activation_stats), ("v", network.delta_stats)):
            close(statistics.mean, published(f"{prefix}{side}_mean"))
            close(statistics.squares, published(f"{prefix}{side}_s"))
            close(statistics.std(), published(f"{prefix}{side}_std"))
            assert statistics.count == published(f"{prefix}k")


def test_edit_of_two_records(training: SimpleNamespace):
    editor, lm = training.editor, training.editor.lm
    batch = collate(lm, records("eval/edit_inner"))
    with capture(editor.layers) as tap:
        logits = target_logits(lm, batch)
        # The published loss of a batch is one mean over all of its target tokens.
        factors = tap.factors(torch.nn.functional.cross_entropy(logits, batch.targets))
    with torch.no_grad():
        made = editor.update(editor.transform(factors), factors)
    for name, layer in made.items():
        close(layer.dense().sum(0), published(f"B/eval/update/{name}.weight"))
        assert factors[name].live().sum() == published(f"B/eval/rows/{name}.weight")[1]

    ids = published("B/eval/edit_outer/input_ids")
    every = torch.arange(ids.shape[1])
    outer = Batch({"input_ids": ids}, torch.zeros_like(every), every, ids[0])
    summed = Update(
        {
            name: LayerUpdate(layer.A.flatten(0, 1), layer.B.flatten(0, 1), layer.scale)
            for name, layer in made.items()
        }
    )
    with torch.no_grad():
        close(target_logits(lm, outer), published("B/eval/logits_outer_pre")[0])
        with overlay(lm.model, summed):
            close(target_logits(lm, outer), published("B/eval/logits_outer")[0])
