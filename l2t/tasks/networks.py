"""Student networks for images and sequences, as plain torch modules.

Inputs are (B, C, H, W), or (B, L) for the one-dimensional one; logits are (B, classes). Nothing is changed in
place and attention is written out, so that every one of them can be stacked (:class:`l2t.Stack`) and
differentiated twice on every device. Start values are torch's own unless a paper's are named.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2t import check

Activation = Callable[[], nn.Module]
PATCH = 4  # pixels a side, of the mixer and the transformer


def image_students(channels: int, size: int, num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """Student constructors by name for images of ``channels`` x ``size`` x ``size``, the default first.

    The perceptrons and the small convolutional nets are for runs of minutes on a CPU, ``lenet`` and
    ``resnet-8`` for longer ones, the others for a GPU.

    Raises:
        ValueError: when a constructor is called and its network cannot take images of that size.

    Example:
        >>> students = image_students(1, 28, 10)
        >>> list(students)[:4]
        ['mlp', 'mlp-relu', 'mlp-wide', 'mlp-norm']
        >>> students["lenet"]()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    image, deep = (channels, size, num_classes), (channels, num_classes)
    return {
        "mlp": partial(mlp, *image),
        "mlp-relu": partial(mlp, *image, activation=nn.ReLU),
        "mlp-wide": partial(mlp, *image, hidden=128),
        "mlp-norm": partial(mlp, *image, norm=True),
        "cnn": partial(cnn, *image),
        "cnn-tanh": partial(cnn, *image, activation=nn.Tanh),
        "cnn-gelu": partial(cnn, *image, activation=nn.GELU),
        "lenet": partial(lenet, *image),
        "resnet-8": partial(ResNet, 8, *deep),
        "resnet-20": partial(ResNet, 20, *deep),
        "resnet-32": partial(ResNet, 32, *deep),
        "wrn-16-4": partial(WideResNet, 16, 4, *deep),
        "wrn-28-10": partial(WideResNet, 28, 10, *deep),
        "wrn-40-10": partial(WideResNet, 40, 10, *deep),
        "mixer": partial(Mixer, *image),
        "vit": partial(ViT, *image),
    }


def of_any_size(name: str) -> bool:
    """Whether :func:`by_name` makes students of this name.

    Example:
        >>> of_any_size("resnet-14"), of_any_size("lenet")
        (True, False)
    """
    return re.fullmatch(r"resnet-\d+|wrn-\d+-\d+|timm:.+", name) is not None


def by_name(name: str, channels: int, num_classes: int) -> Callable[[], nn.Module]:
    """The constructor of ``resnet-DEPTH``, ``wrn-DEPTH-WIDTH`` or ``timm:NAME``, for images of any size.

    A model of timm has random start values and attention that is written out, which can be differentiated
    twice; a transformer of its own fixed image size wants images of that size.

    Raises:
        ValueError: a depth that there is not, or a model that timm does not know.
        ImportError: timm is not installed.

    Example:
        >>> sum(weight.numel() for weight in by_name("wrn-40-4", 3, 10)().parameters())
        8949210
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return _timm(rest, channels, num_classes)
    kind, *sizes = name.split("-")
    depth, *width = map(int, sizes)
    check.network_depth(kind, depth, 4 if width else 2)
    if width:
        return partial(WideResNet, depth, width[0], channels, num_classes)
    return partial(ResNet, depth, channels, num_classes)


def _timm(name: str, channels: int, num_classes: int) -> Callable[[], nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise check.timm_is_missing(name) from error
    check.timm_model(name, timm.is_model(name))

    def make() -> nn.Module:
        model: nn.Module = timm.create_model(name, in_chans=channels, num_classes=num_classes)
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # has no second derivative on the CPU
                module.fused_attn = False  # type: ignore[assignment]
        return model

    return make


def mlp(
    channels: int,
    size: int,
    num_classes: int,
    *,
    hidden: int = 64,
    activation: Activation = nn.Tanh,
    norm: bool = False,
) -> nn.Module:
    """Perceptron of one hidden layer, with LayerNorm before its activation where ``norm``.

    Example:
        >>> mlp(1, 8, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size**2, hidden),
        *([nn.LayerNorm(hidden)] if norm else []),
        activation(),
        nn.Linear(hidden, num_classes),
    )


def cnn(channels: int, size: int, num_classes: int, *, activation: Activation = nn.ReLU) -> nn.Module:
    """Three 3 x 3 convolutions of stride 2 (8, 16 and 32 channels) and a linear read-out.

    Example:
        >>> cnn(1, 28, 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    width, side = channels, size
    for wider in (8, 16, 32):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), activation()]
        width, side = wider, -(-side // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side**2, num_classes))


def cnn_1d(length: int, num_classes: int) -> nn.Module:
    """Three 1-D convolutions of stride 2 and a linear read-out: (B, L) -> (B, classes).

    Example:
        >>> cnn_1d(40, 10)(torch.zeros(2, 40)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Unflatten(-1, (1, length)),
        nn.Conv1d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * -(-length // 8), num_classes),
    )


def lenet(channels: int, size: int, num_classes: int) -> nn.Module:
    """LeNet as Caffe has it, the student of Wu et al. 2018 (L2T-DLF) on MNIST: 20 and 50 filters of 5 x 5,
    each max-pooled without an activation, and 500 units with ReLU.

    Raises:
        ValueError: images of less than 16 pixels a side.

    Example:
        >>> sum(weight.numel() for weight in lenet(1, 28, 10).parameters())
        431080
    """
    check.image_size("lenet", size, 16)
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * side**2, 500),
        nn.ReLU(),
        nn.Linear(500, num_classes),
    )


# ---- residual networks ----


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, start values of He et al. 2015 (arXiv 1502.01852)."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


class _Block(nn.Module):
    """Two 3 x 3 convolutions around an identity: where the shape changes, every other pixel, zeros for the
    new channels (option A of the paper).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        past = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(out + past)


class ResNet(nn.Module):
    """Residual network for small images: He et al., "Deep residual learning" (CVPR 2016), section 4.2.

    A convolution, three stages of 16, 32 and 64 channels with (depth - 2) / 6 blocks each, the mean over the
    pixels and a linear layer.

    Args:
        depth: 6 n + 2: 8, 14, 20, 32, ...
        channels: of the images.
        num_classes: C.

    Raises:
        ValueError: another depth.

    Example:
        >>> sum(weight.numel() for weight in ResNet(20, 3, 10).parameters())
        269722
    """

    def __init__(self, depth: int, channels: int, num_classes: int) -> None:
        super().__init__()
        check.network_depth("resnet", depth, 2)
        self.first, self.norm = _conv(channels, 16, 3), nn.BatchNorm2d(16)
        widths = [16, *(width for width in (16, 32, 64) for _ in range((depth - 2) // 6))]
        self.blocks = nn.Sequential(*(_Block(a, b, 2 if a != b else 1) for a, b in pairwise(widths)))
        self.last = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.blocks(F.relu(self.norm(self.first(x))))
        logits: Tensor = self.last(x.mean((2, 3)))
        return logits


class _WideBlock(nn.Module):
    """Normalisation and activation before each convolution; a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.past = _conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.norm1(x))
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(ready))))
        return out + (x if self.past is None else self.past(ready))


class WideResNet(nn.Module):
    """Wide residual network: Zagoruyko and Komodakis (BMVC 2016), without dropout.

    A convolution, three stages of 16, 32 and 64 times ``width`` channels with (depth - 4) / 6 blocks each,
    the mean over the pixels and a linear layer.

    Args:
        depth: 6 n + 4: 10, 16, 28, 40, ...
        width: how many times wider than a plain residual network.
        channels: of the images.
        num_classes: C.

    Raises:
        ValueError: another depth.

    Example:
        >>> sum(weight.numel() for weight in WideResNet(16, 4, 3, 10).parameters())
        2748890
    """

    def __init__(self, depth: int, width: int, channels: int, num_classes: int) -> None:
        super().__init__()
        check.network_depth("wrn", depth, 4)
        self.first = _conv(channels, 16, 3)
        stages = (16 * width, 32 * width, 64 * width)
        blocks: list[nn.Module] = []
        before = 16
        for stage, outputs in enumerate(stages):
            for block in range((depth - 4) // 6):
                blocks.append(_WideBlock(before, outputs, 2 if stage and not block else 1))
                before = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.last = nn.BatchNorm2d(before), nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = F.relu(self.norm(self.blocks(self.first(x))))
        logits: Tensor = self.last(x.mean((2, 3)))
        return logits


# ---- patches: mixer and transformer ----


class _Patches(nn.Module):
    """A linear map of each 4 x 4 patch: (B, C, H, W) -> (B, patches, dim); a side that 4 does not divide is
    padded with zeros.
    """

    def __init__(self, channels: int, size: int, dim: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(channels, dim, PATCH, PATCH, padding=(-size % PATCH + 1) // 2)
        self.count = (-(-size // PATCH)) ** 2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(x)
        return out.flatten(2).transpose(1, 2)


def _two_layers(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class _Attention(nn.Module):
    """Multi-head self-attention, written out: fused kernels have no second derivative on the CPU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, tokens, d] each
        mixed = (self.scale * q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _Transposed(nn.Module):
    """``inner`` along the tokens in place of the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.transpose(1, 2))
        return out.transpose(1, 2)


class _Residual(nn.Module):
    """x + inner(LayerNorm(x))."""

    def __init__(self, dim: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(dim), inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.norm(x))
        return x + out


class Mixer(nn.Module):
    """A small MLP-Mixer on 4 x 4 patches: Tolstikhin et al. (NeurIPS 2021).

    Args:
        channels: of the images.
        size: their side in pixels.
        num_classes: C.
        dim: channels of a patch.
        depth: blocks, each an MLP over the patches and one over the channels.

    Example:
        >>> Mixer(1, 28, 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, size: int, num_classes: int, *, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = _Patches(channels, size, dim)
        over_patches = partial(_two_layers, self.patches.count, dim // 2)
        self.blocks = nn.Sequential(
            *(
                _Residual(dim, inner)
                for _ in range(depth)
                for inner in (_Transposed(over_patches()), _two_layers(dim, 2 * dim))
            )
        )
        self.norm, self.last = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.norm(self.blocks(self.patches(x)))
        logits: Tensor = self.last(x.mean(1))
        return logits


class ViT(nn.Module):
    """A small vision transformer on 4 x 4 patches, read out by their mean: Dosovitskiy et al. (ICLR 2021).

    Args:
        channels: of the images.
        size: their side in pixels.
        num_classes: C.
        dim: channels of a patch.
        depth: blocks, each an attention and an MLP.
        heads: of the attention; they divide ``dim``.

    Example:
        >>> ViT(1, 28, 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, channels: int, size: int, num_classes: int, *, dim: int = 64, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.patches = _Patches(channels, size, dim)
        self.position = nn.Parameter(0.02 * torch.randn(self.patches.count, dim))
        self.blocks = nn.Sequential(
            *(
                _Residual(dim, inner)
                for _ in range(depth)
                for inner in (_Attention(dim, heads), _two_layers(dim, 2 * dim))
            )
        )
        self.norm, self.last = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.norm(self.blocks(self.patches(x) + self.position))
        logits: Tensor = self.last(x.mean(1))
        return logits
