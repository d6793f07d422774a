"""Find the blocks and the editable layers of a transformer by structure, never by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from workbench.errors import ModelError

Blocks: TypeAlias = Sequence[int] | Sequence[str] | Mapping[str, Sequence[int]] | None
Matrices: TypeAlias = Literal["mlp", "attention", "all"] | Sequence[str]

DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A router's scores choose experts, and a routed expert sees only the tokens sent to it:
# neither has one (activation, delta) pair for each token.
ROUTED = frozenset({"gate", "router", "experts"})


@dataclass(frozen=True, eq=False)
class EditableLayer:
    """One linear map y = W u inside a block, whatever class holds its weight.

    Attributes:
        name: dotted module name inside the model, e.g. "model.layers.16.mlp.up_proj".
        module: the Linear, Conv1D or quantised module: (..., in_features) -> (..., out_features).
        stack: "decoder" or "encoder".
        block: index of the block in its stack.
        kind: "mlp" or "attention".
        in_features: length of an activation u.
        out_features: length of a delta.
        transposed: whether the module stores its weight as (in, out), as Conv1D does.
    """

    name: str
    module: nn.Module
    stack: str
    block: int
    kind: str
    in_features: int
    out_features: int
    transposed: bool

    def dense_weight(self) -> Tensor:
        """W as a floating-point tensor, dequantised where the module is quantised.

        Returns:
            (out_features, in_features), float32 (float64 where the weight is), on its device.
        """
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in DENSE or weight.is_meta:
            return _weight_from_forward(self.module, self.in_features)
        dense = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return dense.T if self.transposed else dense

    def weight_norm(self) -> float:
        """Frobenius norm of W, computed once."""
        return self._weight_norm

    @cached_property
    def _weight_norm(self) -> float:
        return torch.linalg.matrix_norm(self.dense_weight()).item()


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of one encoder or decoder.

    Attributes:
        name: "encoder" or "decoder".
        path: dotted name of the ModuleList that holds the blocks.
        blocks: the blocks, lowest first.
    """

    name: str
    path: str
    blocks: tuple[nn.Module, ...]


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Find the transformer blocks: the outermost ModuleLists whose items hold linear layers.

    Args:
        model: any torch module; `config.is_encoder_decoder` says whether two stacks are wanted.

    Returns:
        The encoder and the decoder of an encoder-decoder model, in that order; else one stack,
        the decoder where there are both (an encoder beside it reads images or sound).

    Raises:
        ModelError: no such ModuleList exists.
    """
    sizes: dict[Stack, int] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(stack.path + ".") for stack in sizes)
        if isinstance(module, nn.ModuleList) and not nested and _holds_blocks(module):
            name = "encoder" if _is_encoder(path, module) else "decoder"
            stack = Stack(name, path, tuple(module))
            sizes[stack] = sum(parameter.numel() for parameter in module.parameters())
    largest = {stack.name: stack for stack in sorted(sizes, key=lambda stack: sizes[stack])}
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    found = tuple(largest[name] for name in ("encoder", "decoder") if name in largest)
    found = found if two else found[-1:]
    if len(found) != 1 + two:
        raise ModelError(
            f"Cannot find the transformer blocks of {type(model).__name__}: looked for "
            f"{'an encoder and a decoder, each ' if two else ''}a ModuleList of blocks that hold "
            f"linear layers; found {_inventory(model)}. Open a transformer whose blocks stand in "
            "a ModuleList."
        )
    return found


def find_layers(
    model: nn.Module, blocks: Blocks = None, matrices: Matrices = "mlp"
) -> tuple[EditableLayer, ...]:
    """Find the layers to edit.

    Args:
        model: a transformer.
        blocks: None for the paper's choice (section 4: the last 3 blocks, or the last 2 of the
            encoder and of the decoder); block indices of a single-stack model, negative ones
            count from the top; strings such as "decoder:3"; or {"encoder": [...], ...}.
        matrices: "mlp", "attention", "all", or the last parts of the names wanted, e.g.
            ["down_proj"].

    Returns:
        The layers in the model's order, an encoder's first.

    Raises:
        ModelError: a block does not exist, or the chosen blocks have no such layer.
    """
    stacks = find_stacks(model)
    if isinstance(matrices, str) and matrices not in ("mlp", "attention", "all"):
        raise ModelError(
            f'matrices={matrices!r} is not known: give "mlp", "attention", "all", or a list of '
            f"layer names such as [{matrices!r}]."
        )
    chosen = _choose_blocks(stacks, blocks)
    layers = [layer for stack, block in chosen for layer in _block_layers(stack, block)]
    wanted = tuple(layer for layer in layers if _matches(layer, matrices))
    if not wanted:
        where = ", ".join(f"{stack.name}:{block}" for stack, block in chosen)
        raise ModelError(
            f"{type(model).__name__} has nothing to edit for matrices={matrices!r} in {where}. "
            f"Looked for linear layers; found {_found(stacks, chosen, layers, matrices)}"
        )
    return wanted


def _choose_blocks(stacks: tuple[Stack, ...], blocks: Blocks) -> list[tuple[Stack, int]]:
    """Resolve a choice of blocks to (stack, index) pairs, in order and without repeats."""
    by_name = {stack.name: stack for stack in stacks}
    if blocks is None:
        count = 3 if len(stacks) == 1 else 2
        return [(s, i) for s in stacks for i in range(len(s.blocks))[-count:]]
    if isinstance(blocks, str):
        blocks = [blocks]
    if isinstance(blocks, Mapping):
        pairs = [(name, index) for name, indices in blocks.items() for index in indices]
    else:
        pairs = [_parse_block(block, stacks) for block in blocks]
    chosen = set()
    for name, index in pairs:
        size = len(by_name[name].blocks) if name in by_name else 0
        if not -size <= index < size:
            valid = ", ".join(f"{s.name} 0 to {len(s.blocks) - 1}" for s in stacks)
            raise ModelError(
                f"There is no block {name}:{index}. This model has blocks {valid} "
                "(negative indices count from the top)."
            )
        chosen.add((name, index % size))
    if not chosen:
        raise ModelError("No blocks were chosen: give at least one index, or blocks=None.")
    return [(s, i) for s in stacks for i in range(len(s.blocks)) if (s.name, i) in chosen]


def _parse_block(block: int | str, stacks: tuple[Stack, ...]) -> tuple[str, int]:
    name, _, index = str(block).rpartition(":")
    if not name and len(stacks) == 1:
        name = stacks[0].name
    if name and index.removeprefix("-").isdecimal():
        return name, int(index)
    names = " and ".join(f'"{stack.name}:{len(stack.blocks) - 1}"' for stack in stacks)
    raise ModelError(
        f"Cannot tell which block {block!r} is. Blocks of this model are named like {names}."
    )


def _block_layers(stack: Stack, block: int) -> Iterator[EditableLayer]:
    attention: tuple[str, ...] = ()
    for name, module in stack.blocks[block].named_modules():
        if "attention" in type(module).__name__.lower() or name.endswith("attn"):
            attention += (name + ".",)
        shape = linear_shape(module)
        if shape is None or shape[1] == 1 or not ROUTED.isdisjoint(name.split(".")):
            continue
        kind = "attention" if name.startswith(attention) else "mlp"
        path = f"{stack.path}.{block}.{name}"
        yield EditableLayer(path, module, stack.name, block, kind, *shape, is_conv1d(module))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear leaf, None for any other module."""
    names = ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")
    inputs, outputs = (getattr(module, name, None) for name in names)
    if isinstance(inputs, int) and isinstance(outputs, int) and not any(module.children()):
        return inputs, outputs
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer that stores its weight as (in, out).

    Known by its attributes: its class takes seconds to import, wherever it is not in use.
    """
    return hasattr(module, "nx") and hasattr(module, "nf")


def _holds_blocks(modules: nn.ModuleList) -> bool:
    """Whether every item is a container and some item holds a linear layer."""
    containers = all(any(item.children()) for item in modules)
    lists = any(isinstance(item, nn.ModuleList) for item in modules)
    return containers and not lists and any(linear_shape(m) for m in modules.modules())


def _is_encoder(path: str, blocks: nn.ModuleList) -> bool:
    """By the path where it says so, else by whether its attention looks both ways."""
    if "decoder" in path or "encoder" in path:
        return "decoder" not in path
    causal = {m.is_causal for m in blocks.modules() if isinstance(getattr(m, "is_causal", 0), bool)}
    return causal == {False}


def _matches(layer: EditableLayer, matrices: Matrices) -> bool:
    if isinstance(matrices, str):
        return matrices in (layer.kind, "all")
    return any(layer.name.endswith("." + suffix) for suffix in matrices)


def _weight_from_forward(module: nn.Module, in_features: int, rows: int = 1024) -> Tensor:
    """Read a quantised or offloaded W by passing the identity through, without hooks."""
    device = next(chain(module.parameters(), module.buffers())).device
    device = "cpu" if device.type == "meta" else device
    columns = []
    with torch.no_grad():
        for start in range(0, in_features, rows):
            identity = torch.zeros(min(rows, in_features - start), in_features, device=device)
            identity.diagonal(start).fill_(1)
            columns.append(module.forward(identity).float())
        bias = module.forward(torch.zeros(1, in_features, device=device)).float()
        return (torch.cat(columns) - bias).T


def _found(
    stacks: tuple[Stack, ...],
    chosen: list[tuple[Stack, int]],
    layers: list[EditableLayer],
    matrices: Matrices,
) -> str:
    """Say what is there, and what to choose instead."""
    names = dict.fromkeys(f"{layer.name.rsplit('.', 1)[-1]} ({layer.kind})" for layer in layers)
    experts = [
        f"{name} {tuple(parameter.shape)}"
        for stack, block in chosen[:1]
        for name, parameter in stack.blocks[block].named_parameters()
        if parameter.ndim == 3
    ]
    found = ", ".join(names) or "none"
    if experts:
        found += f", and expert weights as 3-D parameters ({', '.join(experts)}), not editable"
    elsewhere = [
        f"{stack.name}:{block}"
        for stack in stacks
        for block in range(len(stack.blocks))
        if any(_matches(layer, matrices) for layer in _block_layers(stack, block))
    ]
    if elsewhere:
        return f"{found}. Such layers exist in blocks {', '.join(elsewhere)}: choose those."
    if matrices == "mlp" and layers:
        return f'{found}. Try matrices="attention".'
    return f"{found}. Choose among the layers found."


def _inventory(model: nn.Module) -> str:
    lists = [name or "itself" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    leaves = Counter(type(m).__name__ for m in model.modules() if not any(m.children()))
    kinds = ", ".join(f"{count} {name}" for name, count in leaves.most_common(8))
    return f"ModuleLists: {', '.join(lists[:8]) or 'none'}; leaf modules: {kinds}"
