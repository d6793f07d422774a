"""Views of a model give what the whole model gives, share its tensors and leave it as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import transformers as hf
from families import FAMILIES, PAD, VOCAB, language_model, tiny_tokenizer
from references import (
    assert_exact,
    assert_near,
    editable,
    edited_copy,
    hook_count,
    in_double,
    random_update,
)
from torch import Tensor, nn
from torch.testing import assert_close

from workbench.encoding import Batch, Tokens, collate, sequence_nll, tokenize
from workbench.errors import EditError
from workbench.factors import Factors, capture
from workbench.layers import EditableLayer
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.views import Trunk, TrunkCache, target_logits

MIXED = ["full_attention", "sliding_attention"] * 2
PAIRS = [("The capital", "Lyon"), ("a", "b"), ("it is not", "so, no"), ("The capital", "Oslo")]


def seeded(model: type[hf.PreTrainedModel], config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config).float().eval()


def modernbert() -> hf.PreTrainedModel:
    config = hf.ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        local_attention=4,
        layer_types=MIXED,
        pad_token_id=PAD,
    )
    return seeded(hf.ModernBertForSequenceClassification, config)


def classifier(family: str, model: type[hf.PreTrainedModel]) -> hf.PreTrainedModel:
    config = FAMILIES[family]().config
    config.num_labels = 3
    return seeded(model, config)


# Beside the families: models whose layers attend in two ways, one of which reads that from its
# blocks, and classifiers that pool other positions than BERT's first one.
MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = FAMILIES | {
    "gemma3_mixed": partial(FAMILIES["gemma3"], layer_types=MIXED),  # pyright: ignore[reportCallIssue]
    "modernbert": modernbert,
    "llama_classifier": lambda: classifier("llama", hf.LlamaForSequenceClassification),
    "bart_classifier": lambda: classifier("bart", hf.BartForSequenceClassification),
}


@pytest.fixture(scope="module", params=MODELS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel.wrap(MODELS[request.param](), tiny_tokenizer(), request.param)


@pytest.fixture(scope="module")
def lm64(lm: LanguageModel) -> LanguageModel:
    return in_double(lm)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return language_model("llama")


def texts_for(lm: LanguageModel) -> list[Tokens]:
    texts = [tokenize(lm, p, "LABEL_1" if lm.kind == "classifier" else t) for p, t in PAIRS]
    if lm.source == "bart_classifier":  # pools the end-of-text token
        end = lm.model.config.eos_token_id
        texts = [Tokens((*text.ids, end), text.targets) for text in texts]
    return texts


def cuts(lm: LanguageModel) -> list[tuple[EditableLayer, ...]]:
    """Layers that cut the first stack at its bottom, above its first block and at its top."""
    top = len(lm.stacks[0].blocks) - 1
    if len(lm.stacks) == 1:
        places = [{"decoder": [0, top]}, {"decoder": [1]}, {"decoder": [top]}]
        if lm.stacks[0].name == "encoder":
            places = [{"encoder": place["decoder"]} for place in places]
    else:
        places = [{"encoder": [0]}, {"encoder": [1], "decoder": [0]}, {"decoder": [1]}]
    return [lm.layers(place, "attention") for place in places]


def whole(model: nn.Module, batch: Batch, kind: str) -> Tensor:
    """The plain model's logits, indexed."""
    logits = model(**batch.inputs).logits
    return logits[batch.rows] if kind == "classifier" else logits[batch.rows, batch.columns]


def modules(model: nn.Module) -> dict[str, tuple[int, dict[str, int]]]:
    """Identity of every module and of all it holds."""
    return {
        name: (id(module), {k: id(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


# --- logits where they are needed ------------------------------------------------------------


def test_target_logits_are_the_models_logits(lm: LanguageModel) -> None:
    batch = collate(lm, texts_for(lm))
    with torch.no_grad():
        found, expected = target_logits(lm, batch), whole(lm.model, batch, lm.kind)
    assert found.shape == expected.shape
    assert_near(found, expected)


def test_the_head_sees_target_positions_only(llama: LanguageModel) -> None:
    seen = []
    head = llama.model.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    batch = collate(llama, texts_for(llama))
    target_logits(llama, batch)
    handle.remove()
    assert seen == [(1, len(batch.rows), 32)]


def in_threads(work: Callable[[int], None], users: int) -> None:
    threads = [threading.Thread(target=work, args=(user,)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_want_logits_at_their_own_positions(llama: LanguageModel) -> None:
    texts = texts_for(llama)
    batches = [collate(llama, texts[:1]), collate(llama, texts[1:])]
    expected = [target_logits(llama, batch) for batch in batches]
    barrier = threading.Barrier(len(batches), timeout=60)
    found: dict[tuple[int, int], Tensor] = {}

    def work(user: int) -> None:
        for turn in range(5):
            barrier.wait()
            found[user, turn] = target_logits(llama, batches[user])

    in_threads(work, len(batches))
    assert len(found) == 10
    for (user, _), logits in found.items():
        assert torch.equal(logits, expected[user])


# --- a model in two parts --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_threads_resume_one_trunk_each_with_its_own_hidden_states(family: str) -> None:
    lm = language_model(family)
    trunk = Trunk(lm, cuts(lm)[1])
    batches = [collate(lm, [text]) for text in texts_for(lm)[:2]]
    hiddens = [trunk.hidden(batch) for batch in batches]
    expected = [trunk.logits(*pair) for pair in zip(batches, hiddens, strict=True)]
    barrier = threading.Barrier(len(batches), timeout=60)
    found: dict[int, Tensor] = {}

    def work(user: int) -> None:
        found[user] = trunk.logits(batches[user], hiddens[user])

    def meet(*_: object) -> None:  # both are inside before either resumes
        barrier.wait()

    handle = lm.model.get_input_embeddings().register_forward_hook(meet)
    in_threads(work, len(batches))
    handle.remove()
    assert [torch.equal(found[user], expected[user]) for user in range(2)] == [True, True]


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_the_parts_together_are_the_model(lm64: LanguageModel, cut: int) -> None:
    batch = collate(lm64, texts_for(lm64))
    trunk = Trunk(lm64, cuts(lm64)[cut])
    expected = whole(lm64.model, batch, lm64.kind)
    hidden = trunk.hidden(batch)
    assert trunk.start == [0, 1, 3][cut]
    assert (hidden is None) == (cut == 0)
    assert_exact(trunk.logits(batch, hidden), expected)
    assert_exact(trunk.head(trunk.final(batch, hidden)), expected)


def test_the_parts_together_are_the_model_in_float32(lm: LanguageModel) -> None:
    batch = collate(lm, texts_for(lm))
    trunk = Trunk(lm, cuts(lm)[1])
    expected, hidden = whole(lm.model, batch, lm.kind), trunk.hidden(batch)
    assert_near(trunk.logits(batch, hidden), expected)
    assert_near(trunk.head(trunk.final(batch, hidden)), expected)


def test_edits_act_on_the_upper_part(lm64: LanguageModel) -> None:
    layers = cuts(lm64)[1]
    batch = collate(lm64, texts_for(lm64))
    trunk, update = Trunk(lm64, layers), random_update(layers, dtype=torch.float64)
    hidden = trunk.hidden(batch)
    with overlay(lm64.model, update):
        found = trunk.logits(batch, hidden)
    expected = whole(edited_copy(lm64.model, update), batch, lm64.kind)
    assert not torch.allclose(expected, whole(lm64.model, batch, lm64.kind), atol=1e-7)
    assert_exact(found, expected)


def test_the_upper_part_has_the_models_factors(lm64: LanguageModel) -> None:
    layers = cuts(lm64)[1]
    batch = collate(lm64, texts_for(lm64))
    trunk = Trunk(lm64, layers)
    hidden = trunk.hidden(batch)

    def factors(logits: Callable[[], Tensor]) -> dict[str, Factors]:
        with capture(layers) as tap:
            return tap.factors(sequence_nll(logits(), batch).sum(), batch.size)

    expected = factors(lambda: whole(lm64.model, batch, lm64.kind))
    for name, found in factors(lambda: trunk.logits(batch, hidden)).items():
        # The loss is float32.
        assert_close(found.gradient(), expected[name].gradient(), rtol=1e-5, atol=1e-7)


def test_views_share_all_tensors_and_change_nothing(lm: LanguageModel) -> None:
    before, checksum = modules(lm.model), lm.checksum()
    batch = collate(lm, texts_for(lm))
    trunk = Trunk(lm, cuts(lm)[1])
    trunk.head(trunk.final(batch, trunk.hidden(batch)))
    target_logits(lm, batch)
    mine = {tensor.data_ptr() for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    views = [view for view in vars(trunk).values() if isinstance(view, nn.Module)]
    assert len(views) == 4
    for view in views:
        assert {t.data_ptr() for t in (*view.parameters(), *view.buffers())} <= mine
    assert modules(lm.model) == before
    assert lm.checksum() == checksum
    assert hook_count(lm.model) == 0


def test_a_model_that_fails_leaves_the_trunk_usable(llama: LanguageModel) -> None:
    trunk = Trunk(llama, cuts(llama)[1])
    batch = collate(llama, texts_for(llama))
    hidden = trunk.hidden(batch)
    expected = trunk.logits(batch, hidden)
    with pytest.raises(IndexError):
        trunk.logits(Batch(batch.inputs, batch.rows + 9, batch.columns, batch.targets), hidden)
    assert torch.equal(trunk.logits(batch, hidden), expected)
    assert_close(target_logits(llama, batch), expected)


# --- what is kept of a trunk -----------------------------------------------------------------


class Counting(Trunk):
    """Counts the texts that run through the lower part."""

    texts = 0

    def hidden(self, batch: Batch) -> Tensor | None:
        self.texts += batch.size
        return super().hidden(batch)


def assert_cache_changes_nothing(lm: LanguageModel, numbers: int) -> None:
    texts = texts_for(lm)
    trunk = Trunk(lm, cuts(lm)[1])
    cache = TrunkCache(lm, trunk, 4 * numbers / 2**30)
    for chosen in (texts, texts[:2], texts[::-1], [texts[1]] * 3):
        batch = collate(lm, chosen)
        with torch.no_grad():
            expected = whole(lm.model, batch, lm.kind)
            hidden, finals = cache.hidden(chosen), cache.finals(chosen)
            assert_near(trunk.logits(batch, hidden), expected)
            assert_near(trunk.head(finals), expected)
        # What is handed out may be written to.
        finals.zero_()
        assert hidden is not None
        hidden.zero_()


def test_a_cache_changes_no_result(lm: LanguageModel) -> None:
    """With room for some of the texts: there are hits, misses and texts pushed out."""
    assert_cache_changes_nothing(lm, numbers=1000)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("numbers", [0, 100, 500, 2000, 10**6])
def test_no_memory_limit_changes_a_result(family: str, numbers: int) -> None:
    assert_cache_changes_nothing(language_model(family), numbers)


def test_a_cache_computes_each_text_once(llama: LanguageModel) -> None:
    texts = texts_for(llama)
    trunk = Counting(llama, cuts(llama)[1])
    cache = TrunkCache(llama, trunk, 1.0)
    for chosen in (texts[:2], texts, [texts[3], texts[3]], texts[::-1]):
        cache.hidden(chosen)
        cache.finals(chosen)
    assert trunk.texts == len(texts)


def test_a_cache_stays_within_its_memory(llama: LanguageModel) -> None:
    """Room for two texts: the third drives the first out, and only that one is run again."""
    texts = [tokenize(llama, "prompt", f"target {n}") for n in range(3)]
    each = len(texts[0].ids) * 32 * 4
    trunk = Counting(llama, cuts(llama)[1])
    cache = TrunkCache(llama, trunk, 2.5 * each / 2**30)
    for text, runs in zip((0, 1, 0, 1, 2, 2, 1, 0), (1, 2, 2, 2, 3, 3, 3, 4), strict=True):
        cache.hidden([texts[text]])
        assert trunk.texts == runs


def test_factors_make_room_before_hidden_states_do(llama: LanguageModel) -> None:
    """Room for two texts and two factors: a third text pushes out factors, not a text."""
    texts = [tokenize(llama, "prompt", f"target {n}") for n in range(3)]
    each = len(texts[0].ids) * 32 * 4
    trunk, captured = Counting(llama, cuts(llama)[1]), []

    def captures(some: Sequence[Tokens]) -> list[tuple[Tensor, ...]]:
        captured.extend(some)
        return [(torch.zeros(each // 4),) for _ in some]

    cache = TrunkCache(llama, trunk, 4.5 * each / 2**30)
    cache.factors(texts[:2], captures)
    cache.hidden(texts[:2])
    cache.factors(texts[:2], captures)
    assert captured == texts[:2]
    cache.hidden(texts)
    cache.hidden(texts)
    assert trunk.texts == 3
    cache.factors(texts[:2], captures)
    assert captured == [*texts[:2], texts[1]]


def test_nothing_below_the_cut_is_nothing_to_keep(llama: LanguageModel) -> None:
    trunk = Counting(llama, cuts(llama)[0])
    assert TrunkCache(llama, trunk, 1.0).hidden(texts_for(llama)) is None
    assert trunk.texts == 0


# --- models split over devices ---------------------------------------------------------------


def test_a_split_model_gives_what_the_whole_one_gives(
    llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Some blocks offloaded: their weights are nowhere until they run."""
    pytest.importorskip("accelerate", reason="install the extra 'quant' to run this")
    folder = tmp_path_factory.mktemp("split")
    llama.model.save_pretrained(folder)
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm"], "cpu")
    places |= {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(4)}
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, device_map={**places, "lm_head": "cpu"}, offload_folder=folder / "offload"
    )
    split = LanguageModel.wrap(model, tiny_tokenizer())
    assert sum(p.is_meta for p in model.parameters()) > 10
    batch = collate(split, texts_for(split))
    update = random_update(editable(llama))
    results = []
    for lm in (llama, split):
        trunk = Trunk(lm, editable(lm))
        with capture(editable(lm)) as tap:
            logits = target_logits(lm, batch)
            factors = tap.factors(sequence_nll(logits, batch).sum(), batch.size)
        hidden = trunk.hidden(batch)
        with overlay(lm.model, update):
            resumed = trunk.logits(batch, hidden)
        base = trunk.head(trunk.final(batch, hidden))
        results.append([logits, resumed, base, *(f.gradient() for f in factors.values())])
    for whole_one, split_one in zip(*results, strict=True):
        assert torch.allclose(whole_one, split_one, rtol=1e-6, atol=1e-6)


def test_a_model_that_skips_its_blocks_is_reported(llama: LanguageModel) -> None:
    trunk = Trunk(llama, cuts(llama)[1])
    batch = collate(llama, texts_for(llama))
    model: nn.Module = llama.model.get_submodule("model")
    forward = model.forward
    vars(model)["forward"] = lambda **inputs: forward(**inputs)
    try:
        with pytest.raises(EditError, match="never ran the block"):
            Trunk(llama, cuts(llama)[1]).hidden(batch)
    finally:
        del vars(model)["forward"]
    assert trunk.hidden(batch) is not None
