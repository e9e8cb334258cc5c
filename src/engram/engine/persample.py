"""Per-row gradients, and sums of their powers without ever holding one gradient per row where that can be avoided."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from engram.data.table import Batch
from engram.models.heads import LinearHead, ValueHead

RowLoss = Callable[[Tensor, Tensor | None], Tensor]  # (logits [B, …], labels) -> loss of every row [B]
PATCHES = 8  # rows whose patches are laid out at once
CHUNK = 32  # rows per vmap: larger chunks were slower and larger


def gradients(model: nn.Module, batch: Batch, loss: RowLoss) -> dict[str, Tensor]:
    """The gradient of every row's loss: parameter name -> [B, *shape]. Cost: B times the parameters in memory.

    The model is taken as it stands: call `eval()` first, since batch statistics have no per-row gradient.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    buffers = dict(model.named_buffers())

    def one(params: dict[str, Tensor], inputs: dict[str, Tensor], label: Tensor | None) -> Tensor:
        inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
        logits = functional_call(model, (params, rest, buffers), (), inputs).logits
        return loss(logits, None if label is None else label.unsqueeze(0))[0]

    in_dims = (None, 0, None if batch.labels is None else 0)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
        return vmap(grad(one), in_dims=in_dims, randomness="error")(params, batch.inputs, batch.labels)


def power_sums(model: nn.Module, batch: Batch, loss: RowLoss, power: int) -> dict[str, Tensor]:
    """Sum over rows of |gradient| ** power for every parameter that takes gradients, float64.

    Layers whose per-row gradient is a product of the layer's input and its output's gradient (linear, convolution,
    normalisation) are done from these two, for all rows at once; for a linear layer on vectors and power 2 even without
    forming a gradient: (delta²)ᵀ (input²). A model with any other layer goes through `gradients` in chunks of 32.
    """
    factored = _factored(model, batch, loss, power)
    if factored is not None:
        return factored
    total: dict[str, Tensor] = {}
    for rows in torch.arange(len(batch)).split(CHUNK):
        labels = None if batch.labels is None else batch.labels[rows]
        part = Batch({name: value[rows] for name, value in batch.inputs.items()}, labels, batch.rows[rows])
        for name, g in gradients(model, part, loss).items():
            update = g.abs().double().pow_(power).sum(0)
            total[name] = total[name] + update if name in total else update
    return total


def _factored(model: nn.Module, batch: Batch, loss: RowLoss, power: int) -> dict[str, Tensor] | None:
    """As `power_sums` from one backward pass, or None where a layer does not allow it."""
    layers = _layers(model)
    if layers is None:
        return None
    seen: list[tuple[str, nn.Module, Tensor, Tensor, int]] = []
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.append((name, m, args[0].detach(), out, out._version))
        )
        for name, module in layers.items()
    ]
    try:
        with torch.enable_grad():
            losses = loss(model(**batch.inputs).logits, batch.labels)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, *_ in seen]
    whole = all(out._version == version and len(inputs) == len(batch) for *_, inputs, out, version in seen)
    if len(set(names)) != len(names) or not whole:
        return (
            None  # a layer that is used twice, whose output was overwritten, or whose rows are others than the batch's
        )
    silent = [p for name in layers.keys() - set(names) for p in layers[name].parameters(recurse=False)]
    wanted = [*(out for *_, out, _ in seen), *(p for p in silent if p.requires_grad)]
    deltas = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
    if any(delta is not None for delta in deltas[len(seen) :]):
        return None  # the parameters of a layer that was never called were used nevertheless
    total: dict[str, Tensor] = {}
    for (name, module, inputs, _, _), delta in zip(seen, deltas[: len(seen)], strict=True):
        if delta is not None:
            for part, value in _layer_sums(module, inputs, delta, power).items():
                total[f"{name}.{part}" if name else part] = value
    zero = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters() if p.requires_grad}
    return {name: total.get(name, value) for name, value in zero.items()}


def _layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """The modules that own trainable parameters, if all of them are of a known kind and none is shared."""
    owners = {
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    owned = [p for module in owners.values() for p in module.parameters(recurse=False)]
    known = all(_known(module) for module in owners.values())
    return owners if known and len({id(p) for p in owned}) == len(owned) else None


def _known(module: nn.Module) -> bool:
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        return not module.training
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) in (nn.Linear, nn.LayerNorm, LinearHead, ValueHead)


def _layer_sums(module: nn.Module, inputs: Tensor, delta: Tensor, power: int) -> dict[str, Tensor]:
    if isinstance(
        module, LinearHead
    ):  # its output is spread over all class ids; its rows are the classes that were born
        return _linear_sums(module, inputs, delta[:, module.classes], power)
    if isinstance(module, nn.Linear):
        return _linear_sums(module, inputs, delta, power)
    if isinstance(module, nn.Conv2d):
        return _conv_sums(module, inputs, delta, power)
    return _norm_sums(module, inputs, delta, power)


def _linear_sums(module: nn.Module, inputs: Tensor, delta: Tensor, power: int) -> dict[str, Tensor]:
    if inputs.ndim == 2:
        weight = delta.abs().double().pow(power).T @ inputs.abs().double().pow(power)
        bias = delta
    else:
        flat, grads = inputs.flatten(1, -2), delta.flatten(1, -2)
        weight = torch.bmm(grads.transpose(1, 2), flat).abs_().double().pow_(power).sum(0)
        bias = grads.sum(1)
    return _present(module, weight, bias.abs().double().pow(power).sum(0))


def _conv_sums(module: nn.Conv2d, inputs: Tensor, delta: Tensor, power: int) -> dict[str, Tensor]:
    total = torch.zeros_like(module.weight, dtype=torch.float64).flatten(1)
    for part, grads in zip(inputs.split(PATCHES), delta.split(PATCHES), strict=True):
        per_row = torch.bmm(grads.flatten(2), _patches(module, part).transpose(1, 2))  # [b, out, in·k·k]
        total += per_row.abs_().pow_(power).sum(0)
    bias = delta.sum((2, 3)).abs().double().pow(power).sum(0)
    return _present(module, total.reshape(module.weight.shape), bias)


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What every output position looks at, [b, in·k·k, positions]: one copy of a strided view, several times as fast as
    `unfold`, and in few rows at a time, so that it stays in the cache."""
    padding = module.padding
    assert not isinstance(padding, str)  # _known() has seen to it
    padded = F.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    (kh, kw), (dh, dw), (sh, sw) = module.kernel_size, module.dilation, module.stride
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    b, c, y, x = padded.stride()
    shape = (len(inputs), inputs.shape[1], kh, kw, height, width)
    return padded.as_strided(shape, (b, c, y * dh, x * dw, y * sh, x * sw)).reshape(len(inputs), -1, height * width)


def _norm_sums(module: nn.Module, inputs: Tensor, delta: Tensor, power: int) -> dict[str, Tensor]:
    if isinstance(module, nn.LayerNorm):
        normal = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        spread = list(range(1, inputs.ndim - len(module.normalized_shape)))
    else:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        normal = F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)
        spread = list(range(2, inputs.ndim))
    weight, bias = delta * normal, delta
    if spread:
        weight, bias = weight.sum(spread), bias.sum(spread)
    return _present(module, *(g.abs().double().pow(power).sum(0) for g in (weight, bias)))


def _present(module: nn.Module, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    found = {"weight": weight, "bias": bias}
    return {name: found[name] for name, p in module.named_parameters(recurse=False) if p.requires_grad}
