"""Shallow copies of models: some modules replaced, all others and every parameter shared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn


def shallow(root: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `root` with submodules replaced; everything else is shared, nothing is written.

    Only the modules on the way to the replaced ones are copied, so that whatever is later set on
    those, or put in their place, is the copy's alone.
    """
    clones: dict[str, nn.Module] = {"": clone(root)}
    for path, new in replacements.items():
        parent = ""
        for step in path.split(".")[:-1]:
            child = f"{parent}.{step}".lstrip(".")
            if child not in clones:
                clones[child] = clone(clones[parent]._modules[step])
                clones[parent]._modules[step] = clones[child]
            parent = child
        clones[parent]._modules[path.split(".")[-1]] = new
    return clones[""]


def clone(module: Any) -> nn.Module:
    """A copy of one module that shares its parameters and submodules."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    # Models split over devices keep their forward on the instance, bound to the original.
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(twin)[name] = MethodType(value.__func__, twin)
        elif isinstance(value, partial) and any(arg is module for arg in value.args):
            args = (twin if arg is module else arg for arg in value.args)
            vars(twin)[name] = partial(value.func, *args, **value.keywords)
    return twin
