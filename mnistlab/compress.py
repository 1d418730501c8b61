"""Compression: fewer weights, and fewer bits for each.

What gives a model gives a new one, and leaves its argument as it was, but for `quantised` and
`release`, which belong to the training loop.

The way to a small file: `pack(quantize(fold(model), bits=4), bits=4)`.
"""

import copy
import lzma
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as masks
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

BITS = range(2, 9)
WEIGHTED = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
TINIEST = 2.0**-24  # the smallest float16 above 0
WIDEST = 4  # what is clipped may lie so many times beyond the outermost code

# --- pruning ------------------------------------------------------------------------------------


def prune(model: nn.Module, fraction: float, *, structured: bool = False) -> nn.Module:
    """Take away the smallest weights of convolutions and linear layers.

    By magnitude (Han et al. 2015), but with one threshold for all layers: they are masked, `fit`
    tunes the rest, and `finish` makes the zeros permanent. Structured: each layer but the last
    loses its output channels of the smallest L1 norm (Li et al. 2017), and the model is smaller.

    Args:
        fraction: in 0..1, below 1; of the weights that are not masked yet, or of the channels of
            each layer, of which one stays at least.
        structured: takes one sequence of convolutions (depthwise ones too), linear layers, batch
            normalisation, and layers without parameters.

    Raises:
        ValueError: fraction out of range, or layers that structured pruning does not know.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: must be in 0..1, below 1")
    if not any(isinstance(module, WEIGHTED) for module in model.modules()):
        raise ValueError("the model has no convolution and no linear layer")
    if structured:
        return _cut(copy.deepcopy(_plain(model)), fraction)
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # torch takes flat views
    weights = [(m, "weight") for m in model.modules() if isinstance(m, WEIGHTED)]
    for module, _ in weights:
        module.weight.data = module.weight.data.contiguous()  # what a mask leaves is no parameter
    with torch.no_grad():  # a masked weight that had a gradient could not be copied
        masks.global_unstructured(weights, masks.L1Unstructured, amount=float(fraction))
    return model


def finish(model: nn.Module) -> nn.Module:
    """The model with its masks made permanent: plain weights, zero where they were masked."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            masks.remove(module, "weight")
    return model


def sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, WEIGHTED)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def _plain(model: nn.Module) -> nn.Module:
    if any(hasattr(module, "weight_mask") for module in model.modules()):
        raise ValueError("the model has masked weights: compress.finish(model) makes them plain")
    return model


def _cut(model: nn.Module, fraction: float) -> nn.Module:
    """Take output channels from each layer, in place, and from the next what they fed."""
    layers = list(_sequence(model))
    weighted = [layer for layer in layers if isinstance(layer, WEIGHTED)]
    if len(set(weighted)) < len(weighted):
        raise ValueError("structured pruning does not know how to cut a layer that runs twice")
    kept, channels = None, 0  # indices of what is left of the channels that enter a layer
    for layer in layers:
        if isinstance(layer, WEIGHTED) and not _depthwise(layer):
            norms = layer.weight.detach().abs().flatten(1).sum(1)  # as trained, before any cut
            if kept is not None:
                _take_inputs(layer, kept, channels)
            channels = len(norms)
            n = channels if layer is weighted[-1] else max(1, round(channels * (1 - fraction)))
            kept = norms.topk(n).indices.sort().values
        if kept is not None:
            _take_outputs(layer, kept)
    return model


def _sequence(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested nn.Sequential in the order in which they run."""
    known = isinstance(model, (*WEIGHTED, *NORMS)) or not list(model.parameters())
    if type(model).forward is nn.Sequential.forward:
        for layer in model:
            yield from _sequence(layer)
    elif known and (getattr(model, "groups", 1) == 1 or _depthwise(model)):
        yield model
    else:
        raise ValueError(f"structured pruning does not know how to cut {type(model).__name__}")


def _depthwise(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    return layer.groups == layer.in_channels == layer.out_channels > 1


def _take_inputs(layer: nn.Conv2d | nn.Linear, kept: Tensor, channels: int) -> None:
    # A linear layer behind nn.Flatten has a column for each channel and position.
    weight = layer.weight.detach().unflatten(1, (channels, -1))[:, kept].flatten(1, 2)
    layer.weight = nn.Parameter(weight)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(weight[0]))


def _take_outputs(layer: nn.Module, kept: Tensor) -> None:
    """Of a layer with weights or of a normalisation; other layers have nothing to take from."""
    if not isinstance(layer, (*WEIGHTED, *NORMS)):
        return
    for name, value in layer.named_parameters():
        setattr(layer, name, nn.Parameter(value.detach()[kept]))
    for name, value in layer.named_buffers():
        if value.ndim:  # not the count of batches
            setattr(layer, name, value[kept])
    if _depthwise(layer):
        layer.in_channels = layer.groups = len(kept)
    for name in {"out_channels", "out_features", "num_features"} & vars(layer).keys():
        setattr(layer, name, len(kept))


# --- folding ------------------------------------------------------------------------------------

FUSE = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def fold(model: nn.Module) -> nn.Module:
    """The model in eval mode, with each batch normalisation that directly follows a convolution or
    linear layer of an nn.Sequential multiplied into it: the same outputs but for rounding."""
    model = copy.deepcopy(_plain(model)).eval()
    # What is used twice, as where depth shares weights, has two normalisations: leave it.
    uses = Counter(id(m) for parent in model.modules() for m in parent._modules.values())
    for chain in list(model.modules()):
        if type(chain).forward is not nn.Sequential.forward:
            continue
        for a, b in pairwise(chain._modules):
            layer, norm = chain._modules[a], chain._modules[b]
            fuse = FUSE.get((type(layer), type(norm)))
            if fuse and uses[id(layer)] == uses[id(norm)] == 1:
                setattr(chain, a, fuse(layer, norm))
                setattr(chain, b, nn.Identity())
    return model


# --- quantisation -------------------------------------------------------------------------------


def quantize(model: nn.Module, bits: int) -> nn.Module:
    """Round the weights to `bits` bits, each output channel to multiples of a step of its own.

    A weight becomes q times step, q an integer of -(2^(bits-1) - 1) to the same above zero, step a
    float16 that makes the squared error least. Weights that are on such a grid already stay there.
    What has one dimension (biases, norms) is rounded to float16.

    Raises:
        ValueError: bits not in 2..8, or a number that float16 does not hold.
    """
    _check_bits(bits)
    model = copy.deepcopy(_plain(model)).eval()
    with torch.no_grad():
        for name, value in _tensors(model):
            if _is_weight(value):
                codes, step = _codes(value, bits)
                value.copy_((codes * step).view_as(value))
            else:
                value.copy_(value.half())
            if not value.isfinite().all():
                raise ValueError(f"{name} holds numbers that float16 does not")
    return model


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits}: must be in 2..8")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and values of what a model computes with, each once, by name: training may have changed
    their order."""
    found = {}
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if value.is_floating_point():  # not the counts of batches
            found.setdefault(id(value), (name, value))
    return list(found.values())


def _is_weight(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and value.ndim >= 2


def _codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers [O, M] and steps [O, 1], both as float32, of a weight [O, ...]."""
    flat, top = weight.detach().float().flatten(1), 2 ** (bits - 1) - 1
    peak = flat.abs().amax(1, keepdim=True)
    best, step = torch.full_like(peak, torch.inf), torch.zeros_like(peak)
    # The largest weight is k steps, which finds the grid of weights that have one, or is clipped.
    for k in [*range(1, top + 1), *torch.arange(top, WIDEST * top, top / 16).tolist()]:
        tried = (peak / k).half().float().clamp(min=TINIEST)
        error = ((flat / tried).round().clamp(-top, top) * tried - flat).square().sum(1, True)
        step, best = torch.where(error < best, tried, step), torch.minimum(error, best)
    return (flat / step).round().clamp(-top, top), step


class Quantiser(nn.Module):
    """Rounds a weight [O, ...] to `bits` bits, with a learnt step for each output channel.

    Rounding has gradient 1 (the straight-through estimator, Bengio et al. 2013). That of the step,
    its size and the first step are those of LSQ (Esser et al. 2020), which has a step a layer.
    The largest weight of a channel is at most `WIDEST` times the largest code: at a high learning
    rate a step may otherwise fall to 0, where normalisation makes the gradients explode.
    """

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self.top = 2 ** (bits - 1) - 1
        flat = weight.detach().flatten(1)
        self.step = nn.Parameter(2 * flat.abs().mean(1) / self.top**0.5)  # [O]: does not decay
        self.slow = (flat.shape[1] * self.top) ** -0.5

    def forward(self, weight: Tensor) -> Tensor:
        step = self.step * self.slow
        step = step + (self.step - step).detach()  # its value, with a smaller gradient
        peak = weight.detach().flatten(1).abs().amax(1)
        step = torch.maximum(step, peak / (WIDEST * self.top))
        step = step + (step.half().float().clamp(min=TINIEST) - step).detach()
        step = step.view(-1, *[1] * (weight.ndim - 1))
        ratio = (weight / step).clamp(-self.top, self.top)
        return (ratio + (ratio.round() - ratio).detach()) * step


@contextmanager
def quantised(model: nn.Module, bits: int) -> Iterator[None]:
    """Within it the model computes with weights of `bits` bits while those below them are trained;
    after it they are its weights. With bits=0 nothing happens."""
    try:
        for module in list(model.modules()) if bits else []:
            for name, value in list(module.named_parameters(recurse=False)):
                if value.ndim >= 2:
                    quantiser = Quantiser(value, bits)
                    parametrize.register_parametrization(module, name, quantiser)
        yield
    finally:
        release(model)


def release(model: nn.Module) -> nn.Module:
    """Make the weights that `quantised` gave to a model plain, in place; returns the model.

    Not by torch's remove_parametrizations: it changes a class that copies of a model share.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            found = {name: (p.original, p()) for name, p in module.parametrizations.items()}
            module.__class__ = type(module).__base__
            del module.parametrizations
            for name, (parameter, value) in found.items():
                parameter.data = value.detach()
                module.register_parameter(name, parameter)
    return model


# --- the file -----------------------------------------------------------------------------------

HEADER = struct.Struct("<2sBBBII")  # magic, version, bits, coding, architecture, checksum
MAGIC, VERSION = b"ML", 1
# Symbols of one byte that depend on nothing around them: LZMA then is an adaptive range coder.
LZMA = {
    "format": lzma.FORMAT_RAW,
    "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}],
}


def pack(model: nn.Module, bits: int, *, entropy: bool = True) -> bytes:
    """The weights of a quantised model as a small file; `unpack` gives the same model, bit for bit.

    A header of 13 bytes; steps, biases and norms as float16; weights as integers of `bits` bits.
    The architecture is not in it.

    Args:
        bits: those of `quantize`, or of a recipe's weight_bits (then quantised for its biases).
        entropy: code the integers by zlib or LZMA where that is smaller.

    Raises:
        ValueError: bits not in 2..8, or the model is not one that `quantize(model, bits)` gives.
    """
    _check_bits(bits)
    floats, codes = [], []
    for name, value in _tensors(_plain(model)):
        stored = value.detach().half().float()
        if _is_weight(value):
            q, step = _codes(value, bits)
            stored = (q * step).view_as(value)
            codes.append(q.flatten())
        floats.append((step if _is_weight(value) else value.detach()).flatten())
        if not torch.equal(stored, value):
            raise ValueError(f"{name} is not of {bits} bits: pack(quantize(model, {bits}), {bits})")
    numbers = torch.cat(floats).half().cpu().numpy().astype("<f2").tobytes()
    symbols = (torch.cat(codes) + 2 ** (bits - 1) - 1).to(torch.uint8).cpu().numpy()
    bodies = [np.packbits(np.unpackbits(symbols[:, None], axis=1)[:, -bits:]).tobytes()]
    if entropy:
        bodies += [_deflate(symbols), lzma.compress(symbols, **LZMA)]
    coding = min(range(len(bodies)), key=lambda i: len(bodies[i]))
    content = numbers + bodies[coding]
    start = MAGIC, VERSION, bits, coding, _architecture(model)
    checksum = zlib.crc32(HEADER.pack(*start, 0) + content)
    return HEADER.pack(*start, checksum) + content


def _deflate(symbols: np.ndarray) -> bytes:
    # Weights repeat themselves in runs of zeros alone: to look further makes the code longer.
    coder = zlib.compressobj(9, strategy=zlib.Z_RLE)
    return coder.compress(symbols) + coder.flush()


def unpack(data: bytes, model: nn.Module) -> nn.Module:
    """The model that was packed, in eval mode.

    Args:
        model: of the same architecture, with any weights, such as `build("cnn-8k")`; it is folded
            if what was packed was.

    Raises:
        ValueError: not a packed model, damaged, or of another architecture.
    """
    if len(data) < HEADER.size or data[:2] != MAGIC:
        raise ValueError("not a packed model")
    _, version, bits, coding, architecture, checksum = HEADER.unpack(data[: HEADER.size])
    if version != VERSION:
        raise ValueError(f"a packed model of version {version}; this is for version {VERSION}")
    content = data[HEADER.size :]
    found = zlib.crc32(data[: HEADER.size - 4] + bytes(4) + content)
    if found != checksum:
        raise ValueError(f"the packed model is damaged: checksum {found:08x}, not {checksum:08x}")
    model = copy.deepcopy(_plain(model)).eval()
    if _architecture(model) != architecture:
        model = fold(model)
    if _architecture(model) != architecture:
        raise ValueError("the packed model is of another architecture than the one given")
    tensors = [value for _, value in _tensors(model)]
    weights = [value for value in tensors if _is_weight(value)]
    counts = [len(value) if _is_weight(value) else value.numel() for value in tensors]
    n = sum(value.numel() for value in weights)
    numbers = np.frombuffer(content[: 2 * sum(counts)], "<f2").astype(np.float32)
    body = content[2 * sum(counts) :]
    if coding == 0:
        digits = np.unpackbits(np.frombuffer(body, np.uint8), count=n * bits).reshape(n, bits)
        symbols = np.packbits(np.pad(digits, ((0, 0), (8 - bits, 0))), axis=1)
    else:
        symbols = zlib.decompress(body) if coding == 1 else lzma.decompress(body, **LZMA)
        symbols = np.frombuffer(symbols, np.uint8)
    codes = torch.from_numpy(symbols.astype(np.float32)).flatten() - (2 ** (bits - 1) - 1)
    codes = iter(codes.split([value.numel() for value in weights]))
    with torch.no_grad():
        for value, part in zip(tensors, torch.from_numpy(numbers).split(counts), strict=True):
            if _is_weight(value):
                part = next(codes).view(len(value), -1) * part.view(-1, 1)
            value.copy_(part.view_as(value))
    return model


def _architecture(model: nn.Module) -> int:
    """A checksum of the names and shapes of a model's tensors."""
    shapes = [(name, tuple(value.shape)) for name, value in _tensors(model)]
    return zlib.crc32(repr(shapes).encode())
