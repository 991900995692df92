"""Models of torchscale's LongNet on this library, in place."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ...dilated_attention import DilatedAttention
from ...pattern import Branch, preset
from ...pattern.advice import level_of_caller
from .attention import LongNetAttention
from .branches import TorchscaleBranches
from .padding import PaddingCheck

Compat = Literal["joint", "torchscale"]

# torchscale's DilatedAttention, whichever copy of the package it came from.
_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln", "xpos")
_MEMBERS = (*_PARTS, "num_heads", "head_dim", "dropout", "args")
_METHODS = ("dense_to_sparse", "sparse_to_dense", "gathering", "scattering")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did: the layers by name, as named_modules() has them, and their branches."""

    compat: Compat
    layers: dict[str, tuple[Branch, ...]]

    def __str__(self) -> str:
        lines = []
        for branches in dict.fromkeys(self.layers.values()):
            names = [repr(name) for name, theirs in self.layers.items() if theirs == branches]
            several = f"{len(names)} layers, {names[0]} to {names[-1]}"
            lines.append(
                f"{several if len(names) > 1 else f'1 layer, {names[0]}'}: "
                f"segment_lengths={[w for w, _ in branches]}, "
                f"dilation_rates={[r for _, r in branches]}, compat={self.compat!r}"
            )
        return "\n".join(lines)


def convert(model: nn.Module, compat: Compat = "joint") -> Conversion:
    """Makes every torchscale `DilatedAttention` of the model attend by this library, in place.

    For LongNet, GigaPath's slide encoder and LongViT; neither torchscale nor flash-attn is needed,
    and any device and dtype will do. Layers are known by their attributes, not by their class. They
    stay the same objects, with their parameters, hooks and names, so published checkpoints load
    before and after; their class becomes `LongNetAttention`. Segments, rates and dropout are the
    layers' own; dropout acts in training mode only. Convert before `torch.compile` and before
    sharding. A converted model may be converted again, to the other `compat`.

    Args:
        model: a module that holds such layers, or is one.
        compat: "joint": one softmax over all branches, with its exact gradient; torchscale's output
            but for segments that their rate does not divide. "torchscale": its output there too,
            where rows come out late, and its gradient, which leaves out the branches' weights;
            slower.

    Returns:
        The layers that were converted, to print.

    Raises:
        TypeError: model is not a module.
        ValueError: an unknown compat; no such layer; or, named, a layer with cross-attention, with
            seq_parallel, with a forward of its own, or with wrong segments or rates. Nothing has
            been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if compat not in ("joint", "torchscale"):
        raise ValueError(f"compat must be 'joint' or 'torchscale', got {compat!r}")
    found = {name: module for name, module in model.named_modules() if _is_ours_to_convert(module)}
    if not found:
        raise ValueError(
            f"model must hold layers of torchscale's DilatedAttention, got {type(model).__name__} "
            "with none"
        )
    made = {name: _attention(name, module, compat) for name, module in found.items()}
    padding_check = PaddingCheck()
    for name, module in found.items():
        module.padding_check = padding_check
        module.attention = made[name].train(module.training)
        module.__class__ = LongNetAttention
    conversion = Conversion(compat, {name: new.scheme.branches for name, new in made.items()})
    if compat == "joint":
        _warn_of_drift(conversion)
    return conversion


def _is_ours_to_convert(module: Any) -> bool:
    if isinstance(module, LongNetAttention):
        return True
    has = all(hasattr(module, name) for name in (*_MEMBERS, *_METHODS))
    return has and all(hasattr(module.args, name) for name in ("segment_length", "dilated_ratio"))


def _attention(name: str, module: Any, compat: Compat) -> DilatedAttention | TorchscaleBranches:
    """What attends in a layer; raises ValueError, with the layer's name, if nothing can."""
    where = f"{name or 'model'}."
    for attribute in ("encoder_decoder_attention", "args.seq_parallel"):
        owner = module.args if attribute.startswith("args.") else module
        if getattr(owner, attribute.removeprefix("args."), False):
            raise ValueError(f"{where}{attribute} must be False, got True")
    if "forward" in vars(module):
        raise ValueError(f"{where}forward must be its class's own, got {module.forward!r}")
    lists = (module.args.segment_length, module.args.dilated_ratio)
    try:
        if compat == "torchscale":
            return TorchscaleBranches(*lists, dropout=module.dropout)
        return DilatedAttention(*lists, dropout=module.dropout, **preset("torchscale"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}args must have segments and rates that fit, got {lists}: {error}"
        ) from error


def _warn_of_drift(conversion: Conversion) -> None:
    drifting = {b for branches in conversion.layers.values() for b in branches if b[0] % b[1]}
    if drifting:
        pairs = ", ".join(f"{w} at rate {r}" for w, r in sorted(drifting))
        warnings.warn(
            "args.segment_length should be multiples of args.dilated_ratio for compat='joint' to "
            f"equal torchscale, got {pairs}: on longer sequences torchscale's rows come out late, "
            "which compat='torchscale' reproduces",
            UserWarning,
            stacklevel=level_of_caller(),
        )
