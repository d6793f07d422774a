"""Stacks, blocks and editable layers, against numbers written down for each family."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import FAMILIES, batch_for, language_model
from torch import nn

from workbench.errors import ModelError
from workbench.layers import find_layers, find_stacks

torch.set_num_threads(1)

# Names and (in, out) of the layers of one block, written down from the architectures' papers
# and configs: hidden size 32, MLPs of 48, 64 or 128, 4 heads of 8, of which 2 for keys and values.
LLAMA_MLP = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
LLAMA_ATTENTION = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
LLAMA = ("model.layers", "mlp", LLAMA_MLP, "self_attn", LLAMA_ATTENTION)
FOUR = (32, 32)
SINGLE = {
    "gpt2": (
        "transformer.h",
        "mlp",
        {"c_fc": (32, 128), "c_proj": (128, 32)},
        "attn",
        {"c_attn": (32, 96), "c_proj": FOUR},
    ),
    "gpt_neo": (
        "transformer.h",
        "mlp",
        {"c_fc": (32, 128), "c_proj": (128, 32)},
        "attn.attention",
        {"q_proj": FOUR, "k_proj": FOUR, "v_proj": FOUR, "out_proj": FOUR},
    ),
    "gptj": (
        "transformer.h",
        "mlp",
        {"fc_in": (32, 128), "fc_out": (128, 32)},
        "attn",
        {"q_proj": FOUR, "k_proj": FOUR, "v_proj": FOUR, "out_proj": FOUR},
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        "mlp",
        {"dense_h_to_4h": (32, 64), "dense_4h_to_h": (64, 32)},
        "attention",
        {"query_key_value": (32, 96), "dense": FOUR},
    ),
    "bert": (
        "bert.encoder.layer",
        "",
        {"intermediate.dense": (32, 64), "output.dense": (64, 32)},
        "attention",
        {"self.query": FOUR, "self.key": FOUR, "self.value": FOUR, "output.dense": FOUR},
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "gemma3": LLAMA,
    "olmo2": LLAMA,
    "phi3": (
        "model.layers",
        "mlp",
        {"gate_up_proj": (32, 96), "down_proj": (48, 32)},
        "self_attn",
        {"qkv_proj": (32, 64), "o_proj": FOUR},
    ),
    "qwen2_moe": (
        "model.layers",
        "mlp.shared_expert",
        {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)},
        "self_attn",
        LLAMA_ATTENTION,
    ),
}
T5_GATED = {"wi_0": (32, 48), "wi_1": (32, 48), "wo": (48, 32)}
DOUBLE = {
    "t5": ("encoder.block", "layer.1.DenseReluDense", "decoder.block", "layer.2.DenseReluDense"),
    "t5_gated": (
        "encoder.block",
        "layer.1.DenseReluDense",
        "decoder.block",
        "layer.2.DenseReluDense",
    ),
    "bart": ("model.encoder.layers", "", "model.decoder.layers", ""),
}
DOUBLE_MLP = {
    "t5": ({"wi": (32, 48), "wo": (48, 32)},) * 2,
    "t5_gated": (T5_GATED, T5_GATED),
    "bart": ({"fc1": (32, 48), "fc2": (48, 32)}, {"fc1": (32, 64), "fc2": (64, 32)}),
}
EDITABLE = [family for family in FAMILIES if family != "mixtral"]


def described(layers):
    return {(layer.name, layer.in_features, layer.out_features) for layer in layers}


def spelled(path, blocks, part, shapes):
    part = part and part + "."
    return {(f"{path}.{b}.{part}{name}", *io) for b in blocks for name, io in shapes.items()}


@pytest.mark.parametrize("family", SINGLE)
def test_layers_of_one_stack(family):
    model = language_model(family)
    path, mlp_part, mlp, attention_part, attention = SINGLE[family]
    (stack,) = model.stacks
    assert (stack.path, len(stack.blocks)) == (path, 4)
    assert stack.name == ("encoder" if family == "bert" else "decoder")
    assert described(model.layers()) == spelled(path, (1, 2, 3), mlp_part, mlp)
    everywhere = model.layers(range(4), "attention")
    assert described(everywhere) == spelled(path, range(4), attention_part, attention)
    assert {layer.kind for layer in everywhere} == {"attention"}
    both = described(model.layers([0], "mlp")) | described(model.layers([0], "attention"))
    assert described(model.layers([0], "all")) == both


@pytest.mark.parametrize("family", DOUBLE)
def test_layers_of_encoder_and_decoder(family):
    model = language_model(family)
    encoder, encoder_part, decoder, decoder_part = DOUBLE[family]
    assert [(s.name, s.path, len(s.blocks)) for s in model.stacks] == [
        ("encoder", encoder, 3),
        ("decoder", decoder, 3),
    ]
    below, above = DOUBLE_MLP[family]
    layers = model.layers()
    assert described(layers) == spelled(encoder, (1, 2), encoder_part, below) | spelled(
        decoder, (1, 2), decoder_part, above
    )
    assert [layer.stack for layer in layers] == sorted((s.stack for s in layers), reverse=True)
    # Four projections of self-attention in each encoder block, eight in each decoder block.
    assert len(model.layers({"encoder": [0]}, "attention")) == 4
    assert len(model.layers({"decoder": [0]}, "attention")) == 8


@pytest.mark.parametrize("family", EDITABLE)
def test_found_layers_are_what_the_forward_pass_calls(family):
    """Every layer runs as a module, on (..., in) -> (..., out), and computes W u + b."""
    model = language_model(family)
    names = [f"{s.name}:{i}" for s in model.stacks for i in range(len(s.blocks))]
    layers = model.layers(names, "all")
    seen = {}
    handles = [
        layer.module.register_forward_hook(
            lambda _, args, output, name=layer.name: seen.update({name: (args[0], output)})
        )
        for layer in layers
    ]
    with torch.no_grad():
        model.model(**batch_for(model.model))
    for handle in handles:
        handle.remove()
    for layer in layers:
        u, y = seen[layer.name]
        bias = getattr(layer.module, "bias", None)
        expected = u @ layer.dense_weight().T + (0 if bias is None else bias)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
        assert (u.shape[-1], y.shape[-1]) == (layer.in_features, layer.out_features)
        exact = layer.module.get_parameter("weight").double().pow(2).sum().sqrt().item()
        assert layer.weight_norm() == pytest.approx(exact, rel=1e-5)


class PackedLinear(nn.Module):
    """A quantised layer of a foreign format: whole numbers and a scale, and no `weight`."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 2100, 5
        self.register_buffer("packed", torch.arange(5 * 2100).reshape(5, 2100) % 17 - 8)
        self.bias = nn.Parameter(torch.arange(5.0))

    def forward(self, u):
        return u @ (self.get_buffer("packed") / 4).T + self.bias


def test_a_foreign_quantised_layer_shows_its_weight():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": PackedLinear()})])})
    (layer,) = find_layers(model)
    layer.module.register_forward_hook(lambda *_: pytest.fail("hooks belong to forward passes"))
    expected = layer.module.get_buffer("packed") / 4
    assert torch.equal(layer.dense_weight(), expected)
    assert layer.weight_norm() == pytest.approx(expected.norm().item())


def test_conv1d_is_transposed_and_linear_is_not():
    assert all(layer.transposed for layer in language_model("gpt2").layers(matrices="all"))
    assert not any(layer.transposed for layer in language_model("gpt_neo").layers(matrices="all"))


@pytest.mark.parametrize(
    ("family", "blocks", "expected"),
    [
        ("llama", [3, 1, 1], [("decoder", 1), ("decoder", 3)]),
        ("llama", (-1, 0), [("decoder", 0), ("decoder", 3)]),
        ("llama", ["decoder:-2"], [("decoder", 2)]),
        ("llama", "decoder:2", [("decoder", 2)]),
        ("llama", {"decoder": range(2)}, [("decoder", 0), ("decoder", 1)]),
        ("t5", ["decoder:0", "encoder:-1"], [("encoder", 2), ("decoder", 0)]),
        ("t5", {"decoder": [0], "encoder": [1]}, [("encoder", 1), ("decoder", 0)]),
    ],
)
def test_choice_of_blocks(family, blocks, expected):
    layers = language_model(family).layers(blocks)
    assert list(dict.fromkeys((layer.stack, layer.block) for layer in layers)) == expected


@pytest.mark.parametrize(
    ("family", "blocks", "message"),
    [
        ("llama", [4], r"no block decoder:4.*decoder 0 to 3"),
        ("llama", [-5], r"no block decoder:-5.*decoder 0 to 3"),
        ("llama", ["encoder:0"], r"no block encoder:0.*decoder 0 to 3"),
        ("llama", ["top"], r"'top'.*\"decoder:3\""),
        ("llama", [], r"No blocks were chosen"),
        ("t5", [1], r"block 1 .*\"encoder:2\" and \"decoder:2\""),
        ("t5", {"decoder": [3]}, r"decoder:3.*encoder 0 to 2, decoder 0 to 2"),
    ],
)
def test_unknown_blocks(family, blocks, message):
    with pytest.raises(ModelError, match=message):
        language_model(family).layers(blocks)


def test_choice_of_matrices_by_name():
    model = language_model("llama")
    names = [layer.name for layer in model.layers([0], ["down_proj", "self_attn.o_proj"])]
    assert names == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    with pytest.raises(ModelError, match=r"\['proj'\].*found q_proj \(attention\).*Choose among"):
        model.layers([0], ["proj"])
    with pytest.raises(ModelError, match=r"list of layer names such as \['down_proj'\]"):
        model.layers([0], "down_proj")


def test_mixture_of_experts_without_dense_layers():
    model = language_model("mixtral")
    with pytest.raises(ModelError, match=r"gate_up_proj \(4, 96, 32\).*matrices=\"attention\""):
        model.layers()
    assert described(model.layers(None, "attention")) == spelled(
        "model.layers", (1, 2, 3), "self_attn", LLAMA_ATTENTION
    )


def test_mixture_of_experts_names_its_dense_blocks():
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0, 2],
    }
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(vocab_size=99, **settings))
    with pytest.raises(ModelError, match="exist in blocks decoder:0, decoder:2: choose those"):
        find_layers(model, [3])
    assert {layer.block for layer in find_layers(model)} == {2}
    assert described(find_layers(model)) == spelled("model.layers", [2], "mlp", LLAMA_MLP)


def test_gates_of_one_output_and_routers_are_left_alone():
    names = [layer.name for layer in language_model("qwen2_moe").layers([0], "all")]
    assert len(names) == 7
    assert not any(name.endswith("gate") for name in names)
    block = nn.ModuleDict(
        {"mlp": nn.ModuleDict({"router": nn.Linear(8, 4), "up": nn.Linear(8, 8)})}
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert described(find_layers(model)) == {("layers.0.mlp.up", 8, 8)}


def test_stacks_of_other_structures():
    """A vision tower is not edited; bidirectional attention makes an encoder; shared blocks."""
    text = FAMILIES["llama"]().config
    vision = hf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    both = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    assert [stack.path for stack in find_stacks(both)] == ["model.language_model.layers"]
    bert = hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=4, n_heads=4)
    )
    assert [(s.name, s.path) for s in find_stacks(bert)] == [
        ("encoder", "distilbert.transformer.layer")
    ]
    assert len(find_layers(bert)) == 6


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "ModuleLists: none; leaf modules: 1 Linear"),
        (nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(4, 4)])}), "ModuleLists: heads"),
    ],
)
def test_a_model_without_blocks(model, found):
    with pytest.raises(ModelError, match=f"ModuleList of blocks.*{found}"):
        find_layers(model)
