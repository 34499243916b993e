"""Where a model has its feedforward blocks: found by names and widths of linear maps, not by importing its library.

D input width, H hidden width, O output width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from fff.adapt.probe import on_meta, output_dropout
from fff.ops.activation import ACTIVATIONS, activation_name


class Widths(NamedTuple):
    """What a linear map takes and gives."""

    in_features: int
    out_features: int


class Block(NamedTuple):
    """A feedforward block D -> H -> O of some module, and how another layer gets into its place.

    kind: its name in reports.
    first: the map D -> H; of a gated block the maps of gate and value, in this order, or one map D -> 2 H of both.
    last: the map H -> O.
    activation: what stands between them, of a gated block behind the gate; None where the block does not show it.
    place: child of the module that the new layer takes the place of, as a dotted path; "" is the module itself.
    idle: attributes of the module, as dotted paths, that become identities: the new layer does their work.
    dropout: of the output, a probability; it stays behind a new layer that takes the place of the module itself.
    """

    kind: str
    first: tuple[nn.Module, ...]
    last: nn.Module
    activation: Callable[[Tensor], Tensor] | None = None
    place: str = ""
    idle: tuple[str, ...] = ()
    dropout: float = 0.0

    @property
    def in_features(self) -> int:
        return _widths_of(self.first[0]).in_features

    @property
    def out_features(self) -> int:
        return _widths_of(self.last).out_features

    @property
    def maps(self) -> tuple[nn.Module, ...]:
        return (*self.first, self.last)


Match = Callable[[str, nn.Module], Block | None]
Made = TypeVar("Made")

# Names of the first maps, and of the last one.
_WHOLE = {
    "Mlp": (("fc1",), "fc2"),  # timm; packed too (GluMlp), where fc1 is twice as wide
    "SwiGLU": (("fc1_g", "fc1_x"), "fc2"),  # timm
    "GPT-2": (("c_fc",), "c_proj"),  # also nanoGPT and its kin
    "Llama": (("gate_proj", "up_proj"), "down_proj"),
    "Llama, w1 w2 w3": (("w1", "w3"), "w2"),  # as Meta published it
    "Llama, packed": (("gate_up_proj",), "down_proj"),  # Phi-3, GLM
    "Llama without gate": (("up_proj",), "down_proj"),  # Nemotron
    "T5": (("wi",), "wo"),
    "T5, gated": (("wi_0", "wi_1"), "wo"),
    "ModernBERT": (("Wi",), "Wo"),  # packed
    "GPT-NeoX": (("dense_h_to_4h",), "dense_4h_to_h"),  # Falcon
    "GPT-J": (("fc_in",), "fc_out"),  # CodeGen
    "DistilBERT": (("lin1",), "lin2"),
}
_ACTIVATIONS = ("act", "act_fn", "activation", "activation_fn", "gelu", "intermediate_act_fn")
# The kernels know functions by name, and transformers has these under names of its own.
_SAME = {
    "GELUActivation": ACTIVATIONS["gelu"],
    "GELUTanh": ACTIVATIONS["gelu_tanh"],
    "NewGELUActivation": ACTIVATIONS["gelu_tanh"],
    "SiLUActivation": ACTIVATIONS["silu"],
}
_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def once_each(blocks: Mapping[str, Block], make: Callable[[str, Block], Made]) -> dict[str, Made]:
    """What `make(name, block)` gives, by name of the block; called once for blocks that share all their weights."""
    made: dict[tuple[object, ...], Made] = {}
    found = {}
    for name, block in blocks.items():
        # Tensors are told apart by identity.
        weights = (tuple([*module.parameters(), *module.buffers()]) or (module,) for module in block.maps)
        key = (*weights, activation_name(block.activation) or block.activation)
        if key not in made:
            made[key] = make(name, block)
        found[name] = made[key]
    return found


def linear_widths(module: nn.Module) -> Widths | None:
    """Widths of a linear map: `nn.Linear`, what has its attributes, or the transposed `Conv1D` of GPT-2; else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    if _is_transposed(module):
        return Widths(*weight.shape)
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return Widths(*widths) if all(isinstance(width, int) for width in widths) else None


def linear_weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(O, D) weight and (O,) bias or None, detached; ValueError for what is no linear map."""
    _widths_of(module)
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    return weight.T if _is_transposed(module) else weight, None if bias is None else bias.detach()


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _widths_of(module: nn.Module) -> Widths:
    widths = linear_widths(module)
    if widths is None:
        raise ValueError(f"{module} is no linear map")
    return widths


def known_block(module: nn.Module) -> Block | None:
    """The feedforward block of a module of a known kind, else None.

    Known are Mlp, GluMlp and SwiGLU of timm, BERT, DistilBERT, ModernBERT, GPT-2, GPT-J, GPT-NeoX, Llama, Phi-3 and T5
    of transformers and what is built as they are (nanoGPT too), and torch's `nn.TransformerEncoderLayer` and
    `nn.TransformerDecoderLayer`; each with D = O.

    A module with the names of one of them that does more around its maps, such as a norm or a residual, is not known:
    it would be lost. So it is run on a few rows; on the meta device, where that shows nothing, its names are believed,
    and dropout of its output is taken for none.
    """
    if isinstance(module, _TORCH):
        return _torch_block(module)
    return _bert_block(module) or _whole_block(module)


def _torch_block(module: nn.Module) -> Block | None:
    kind = next(kind for kind in _TORCH if isinstance(module, kind))
    if type(module)._ff_block is not kind._ff_block:
        return None  # a subclass computes something else
    return Block(
        kind.__name__,
        (module.linear1,),
        module.linear2,
        module.activation,
        place="linear1",
        idle=("activation", "dropout", "linear2"),
    )


def _bert_block(module: nn.Module) -> Block | None:
    """`intermediate` is the first map and the activation; `output` the last map, and dropout, residual and norm."""
    intermediate, output = (getattr(module, name, None) for name in ("intermediate", "output"))
    if not isinstance(intermediate, nn.Module) or not isinstance(output, nn.Module):
        return None
    first, last = (getattr(part, "dense", None) for part in (intermediate, output))
    alone = _parameters(intermediate) == _parameters(first) and _takes_one_tensor(intermediate)
    if not alone or not _returns((first,), last):
        return None
    return Block("BERT", (first,), last, module_activation(intermediate), place="intermediate", idle=("output.dense",))


def _whole_block(module: nn.Module) -> Block | None:
    for kind, (first_names, last_name) in _WHOLE.items():
        first = tuple(getattr(module, name, None) for name in first_names)
        last = getattr(module, last_name, None)
        if not _returns(first, last):
            continue
        # With parameters elsewhere, or more to be told than x, its forward does more than the block.
        norm = getattr(module, "norm", None)
        if _parameters(module) != _parameters(*first, last, norm) or not _takes_one_tensor(module):
            continue
        dropout = 0.0 if on_meta(module) else output_dropout(module, _widths_of(first[0]).in_features, first, last)
        if dropout is not None:
            plain = not _parameters(norm) and not getattr(module, "gate_last", False)
            return Block(kind, first, last, module_activation(module) if plain else None, dropout=dropout)
    return None


def _returns(first: tuple[nn.Module | None, ...], last: nn.Module | None) -> bool:
    """Whether the widths go D -> H -> D, or D -> 2 H, H -> D through a gate packed into one map."""
    if last is None or None in first:
        return False
    ends, out = {linear_widths(module) for module in first}, linear_widths(last)
    if len(ends) != 1 or None in ends or out is None:
        return False
    (widths,) = ends
    hidden = {out.in_features, 2 * out.in_features} if len(first) == 1 else {out.in_features}
    return widths.in_features == out.out_features and widths.out_features in hidden


def _parameters(*modules: nn.Module | None) -> set[nn.Parameter]:
    return {parameter for module in modules if module is not None for parameter in module.parameters()}


def _takes_one_tensor(module: nn.Module) -> bool:
    needed = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)
    ]
    return len(needed) == 1


def module_activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The activation that a module has under one of the usual names; None where it has none."""
    found = (getattr(module, name, None) for name in _ACTIVATIONS)
    activation = next((activation for activation in found if callable(activation)), None)
    return _SAME.get(type(activation).__name__, activation)


def feedforward_blocks(model: nn.Module, match: Match | None = None) -> dict[str, Block]:
    """The feedforward blocks of a model by module name, in module order; none within another.

    match: called as `match(name, module)` for the model and every module in it, gives a `Block` or None. The default
        asks `known_block(module)`.

    ValueError if there is none; it lists the modules that look as if they were one.
    """
    blocks: dict[str, Block] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in blocks if not blocks[outer].place):
            continue
        block = known_block(module) if match is None else match(name, module)
        if block is not None:
            blocks[name] = block
    if blocks:
        return blocks
    candidates = "; ".join(_candidates(model)) or "none"
    raise ValueError(
        f"model={type(model).__name__} has no feedforward block of a known kind, or none that `match` takes. "
        f"Modules with two linear maps D -> H -> D: {candidates}. "
        "Pass match=..., a function of (name, module) that returns a fff.adapt.Block or None"
    )


def _candidates(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        maps = [(child, widths) for child, part in module.named_children() if (widths := linear_widths(part))]
        for i, (first, (width, units)) in enumerate(maps):
            hidden = {units, units / 2} - {width}  # half of them behind a packed gate; equal widths are of attention
            last = next((child for child, (h, out) in maps[i + 1 :] if h in hidden and out == width), None)
            if last is not None:
                path = f"{width} -> {units} -> {width}"
                yield f"{name or 'the model itself'} ({type(module).__name__}: {first}, {last}, {path})"
                break
