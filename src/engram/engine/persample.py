"""Per-row gradients, and sums of their powers without ever holding one gradient per row where that can be avoided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_weight

from engram.data.table import Batch
from engram.models.heads import LinearHead, ValueHead

RowLoss = Callable[[Tensor, Tensor | None], Tensor]  # (logits [B, …], labels) -> loss of every row [B]
CHUNK = 32  # rows per pass through convolutions or vmap: more of them take more memory and gain little


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
    forming a gradient: (delta²)ᵀ (input²). A model with any other layer goes through `gradients`; both that and
    convolutions take 32 rows at a time.
    """
    layers = _layers(model)
    size = CHUNK if layers and any(isinstance(module, nn.Conv2d) for module in layers.values()) else len(batch)
    return _added(
        _factored(model, layers, part, loss, power) or _by_row(model, part, loss, power) for part in _parts(batch, size)
    )


def _by_row(model: nn.Module, batch: Batch, loss: RowLoss, power: int) -> dict[str, Tensor]:
    """As `power_sums`, for any layer."""
    return _added(
        {name: g.abs().double().pow_(power).sum(0) for name, g in gradients(model, part, loss).items()}
        for part in _parts(batch, CHUNK)
    )


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    if size >= len(batch):
        yield batch
        return
    for rows in torch.arange(len(batch)).split(size):
        labels = None if batch.labels is None else batch.labels[rows]
        yield Batch({name: value[rows] for name, value in batch.inputs.items()}, labels, batch.rows[rows])


def _added(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for sums in parts:
        total = {name: total[name] + value if name in total else value for name, value in sums.items()}
    return total


def _factored(
    model: nn.Module, layers: dict[str, nn.Module] | None, batch: Batch, loss: RowLoss, power: int
) -> dict[str, Tensor] | None:
    """As `power_sums` from one backward pass, or None where a layer does not allow it."""
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
    return {
        name: total[name] if name in total else torch.zeros_like(p, dtype=torch.float64)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """The modules that own trainable parameters, if all of them are of a known kind and none is shared."""
    owned = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    owners = {home: model.get_submodule(home) for home in dict.fromkeys(name.rpartition(".")[0] for name, _ in owned)}
    known = all(_known(module) for module in owners.values())
    return owners if known and len({id(p) for _, p in owned}) == len(owned) else None


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
    """The rows become the groups of one convolution, whose weight then has a gradient for each of them."""
    rows, shape = len(inputs), module.weight.shape
    per_row = conv2d_weight(
        inputs.reshape(1, -1, *inputs.shape[2:]),
        (rows * shape[0], *shape[1:]),
        delta.reshape(1, -1, *delta.shape[2:]),
        module.stride,
        module.padding,
        module.dilation,
        groups=rows,
    )
    total = per_row.view(rows, *shape).abs_().pow_(power).sum(0).double()
    if module.bias is None:
        return {"weight": total} if module.weight.requires_grad else {}
    return _present(module, total, delta.sum((2, 3)).abs().double().pow(power).sum(0))


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
    return {name: found[name] for name, p in module._parameters.items() if p is not None and p.requires_grad}
