"""Division of an image into regions by a small network that learns its own labels, one image at a time.

The published account is TESLA's :cite:p:`tesla2023`: labels are what the network answers loudest, rare labels are merged
into what lies around them, and the network learns to answer so while neighbouring answers are pulled together.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from .._device import resolve_device
from ..errors import DataValueError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "SelfLabelling",
    "SelfLabellingConfig",
    "build_network",
    "continuity",
    "main_labels",
    "merge_minor",
    "respond",
    "self_label",
    "target_clusters",
]

Normalisation = Literal["image", "published"]
Bounds = Literal["image", "published"]


@dataclass(frozen=True)
class SelfLabellingConfig:
    """Settings of :func:`self_label`.

    Attributes
    ----------
    channels
        Most labels, and width of the network.
    threshold
        Pixels that a label needs to stand by itself; by default a thousandth of the image. Published: 1000.
    radius
        Reach in pixels of what counts as lying around a label.
    min_labels
        Training ends when no more labels than so many stand by themselves.
    max_iterations
        Most steps of training.
    lr, momentum
        Of stochastic gradient descent.
    similarity_weight, continuity_weight
        Of the cross-entropy with the network's own labels, and of the differences between neighbouring pixels.
    normalisation
        ``"image"``: once trained, the normalisation layers take their statistics from the image once and keep them;
        ``"published"``: they stay in training mode, so that a pixel's answer depends on what it is shown with.
    bounds
        ``"image"``: windows end at the border of the image; ``"published"``: height and width are interchanged, so that
        part of an image that is not square does not count.
    """

    channels: int = 100
    threshold: int | None = None
    radius: int = 3
    min_labels: int = 30
    max_iterations: int = 30
    lr: float = 0.1
    momentum: float = 0.9
    similarity_weight: float = 1.0
    continuity_weight: float = 5.0
    normalisation: Normalisation = "image"
    bounds: Bounds = "image"

    def __post_init__(self) -> None:
        for name, kind in (("normalisation", Normalisation), ("bounds", Bounds)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise DataValueError(f"{name}={value!r} is unknown; possible: {', '.join(map(repr, get_args(kind)))}")
        for name in ("channels", "threshold", "radius", "min_labels", "max_iterations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DataValueError(f"{name}={value!r} must be at least 1")
        if not self.lr > 0:
            raise DataValueError(f"lr={self.lr!r} must be positive")
        for name in ("momentum", "similarity_weight", "continuity_weight"):
            if not getattr(self, name) >= 0:
                raise DataValueError(f"{name}={getattr(self, name)!r} must not be negative")


class SelfLabelling(NamedTuple):
    """What :func:`self_label` gives.

    Attributes
    ----------
    labels
        Labels by decreasing size, rare ones merged, (h, w) int64.
    raw
        What the trained network answers loudest, (h, w) int64.
    history
        Per step: both terms of the loss, and how many labels there are and stand by themselves.
    network
        The trained network.
    """

    labels: np.ndarray
    raw: np.ndarray
    history: list[dict[str, float]]
    network: nn.Module


def build_network(n_bands: int = 2, channels: int = 100) -> nn.Module:
    """Two 5 × 5 convolutions, rectified and normalised, and one 1 × 1, normalised: as many answers as channels."""
    from torch import nn

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(n_bands, channels, 5, padding=2),
            relu1=nn.ReLU(),
            bn1=nn.BatchNorm2d(channels),
            conv2=nn.Conv2d(channels, channels, 5, padding=2),
            relu2=nn.ReLU(),
            bn2=nn.BatchNorm2d(channels),
            conv3=nn.Conv2d(channels, channels, 1),
            bn3=nn.BatchNorm2d(channels),
        )
    )


def self_label(
    image: np.ndarray,
    config: SelfLabellingConfig | None = None,
    *,
    seed: int = 0,
    device: str | None = None,
    network: nn.Module | None = None,
) -> SelfLabelling:
    """Train a network on one image to label its pixels.

    Parameters
    ----------
    image
        Bands in [0, 1], (h, w, bands).
    config
        Settings.
    seed
        Of the initial weights; the global state of torch is left alone.
    device
        Where to train; by default as set in :data:`hespotex.settings`.
    network
        Network to start from, in place of a new one; it is trained in place.

    Notes
    -----
    Memory grows with pixels × channels: about 0.4 GB per layer at a million pixels and 100 channels.
    """
    import torch
    from torch.nn import functional

    config = config or SelfLabellingConfig()
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim != 3 or min(pixels.shape) == 0:
        raise DataValueError(f"image must be (h, w, bands), got shape {pixels.shape}")
    if pixels.shape[0] * pixels.shape[1] == 1:
        raise DataValueError("image is one pixel; there is nothing to divide")
    if not np.isfinite(pixels).all():
        raise DataValueError("image has values that are NaN or infinite; fill what lies outside the tissue with 0")
    height, width, n_bands = pixels.shape
    threshold = config.threshold or max(1, height * width // 1000)
    where = resolve_device(device)
    if network is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(n_bands, config.channels)
    network = network.to(where).train()
    shown = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()).to(where)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=config.momentum)
    history = []
    try:
        for _ in range(config.max_iterations):
            optimizer.zero_grad()
            response = network(shown)[0]
            labels = response.detach().argmax(dim=0)
            goal = merge_minor(labels, threshold, config.radius, bounds=config.bounds)
            similarity = functional.cross_entropy(response.flatten(1).T, goal.flatten())
            difference = continuity(response)
            (config.similarity_weight * similarity + config.continuity_weight * difference).backward()
            optimizer.step()
            n_main = len(main_labels(labels, threshold))
            history.append(
                {
                    "similarity": float(similarity.detach()),
                    "continuity": float(difference.detach()),
                    "n_labels": float(len(labels.unique())),
                    "n_main": float(n_main),
                }
            )
            if n_main <= config.min_labels:
                break
        raw = respond(network, shown, config.normalisation).argmax(dim=0)
        final = merge_minor(_by_size(raw), threshold, config.radius, bounds=config.bounds)
    finally:
        network.cpu()
    return SelfLabelling(final.cpu().numpy(), raw.cpu().numpy(), history, network)


def respond(network: nn.Module, shown: torch.Tensor, normalisation: Normalisation = "image") -> torch.Tensor:
    """Answers of a trained network to the image (1, bands, h, w) that it was trained on, (channels, h, w).

    With ``normalisation="image"`` the statistics of the normalisation layers become those of the image, and the network
    is left in evaluation mode; with ``"published"`` it answers in training mode.
    """
    import torch
    from torch import nn

    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        network.train()
        if normalisation == "published":
            return network(shown)[0]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 1.0
        network(shown)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        network.eval()
        return network(shown)[0]


def continuity(response: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between vertical neighbours plus that between horizontal ones, of (channels, h, w).

    It is 0 along an axis of one pixel.
    """
    down, right = response.diff(dim=1).abs(), response.diff(dim=2).abs()
    return sum((each.mean() for each in (down, right) if each.numel()), response.new_zeros(()))


def main_labels(labels: torch.Tensor, threshold: int) -> torch.Tensor:
    """Labels that at least `threshold` pixels have, ascending."""
    found, size = labels.unique(return_counts=True)
    return found[size >= threshold]


def merge_minor(labels: torch.Tensor, threshold: int, radius: int, *, bounds: Bounds = "image") -> torch.Tensor:
    """Give every label of fewer than `threshold` pixels up for the main label that lies around its pixels most often.

    Parameters
    ----------
    labels
        Label image, (h, w) int64, labels from 0 on.
    threshold
        Pixels that a main label has at least.
    radius
        Windows reach so many pixels from each pixel of a minor label; a pixel counts once for every window it lies in.
    bounds
        See :class:`SelfLabellingConfig`.

    Returns
    -------
    Labels, (h, w) int64. All minor labels are given up at once and everywhere; one without a main label around it stays.
    Equal counts are decided for the lower label.
    """
    import torch

    height, width = labels.shape
    end_row, end_column = (height, width) if bounds == "image" else (min(height, width),) * 2
    n = int(labels.max()) + 1
    main = main_labels(labels, threshold)
    is_main = torch.zeros(n, dtype=torch.bool, device=labels.device)
    is_main[main] = True
    row, column = (~is_main[labels]).nonzero(as_tuple=True)
    if len(row) == 0 or len(main) == 0:
        return labels.clone()
    minor = labels[row, column]
    around = torch.zeros(n * n, dtype=torch.int64, device=labels.device)
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            r, c = row + down, column + right
            held = (r >= 0) & (r < end_row) & (c >= 0) & (c < end_column)
            pair = minor[held] * n + labels[r[held], c[held]]
            around += torch.bincount(pair, minlength=n * n)
    count = around.reshape(n, n) * is_main
    new = torch.arange(n, device=labels.device)
    given_up = ~is_main & (count.amax(dim=1) > 0)
    # Of equal counts the lower label: argmax does not say which it takes.
    first = (count == count.amax(dim=1, keepdim=True)).int().cumsum(dim=1).eq(0).sum(dim=1)
    new[given_up] = first[given_up]
    return new[labels]


def _by_size(labels: torch.Tensor) -> torch.Tensor:
    """Labels numbered anew by decreasing size, the lower first among equals."""
    import torch

    found, inverse, size = labels.unique(return_inverse=True, return_counts=True)
    order = torch.sort(size, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(found), device=labels.device)
    return rank[inverse]


def target_clusters(
    labels: np.ndarray,
    gene_band: np.ndarray,
    size: Literal["small", "large"] = "small",
    *,
    tissue: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which labels show the markers.

    Parameters
    ----------
    labels, gene_band
        Label image and gene band, (h, w).
    size
        ``"small"``: labels whose mean is above half of the largest; ``"large"``: above a third.
    tissue
        Pixels that count, (h, w) bool; all by default.

    Returns
    -------
    The target labels, (t,), and all labels with their means, (l, 2), both by decreasing mean.
    """
    if size not in ("small", "large"):
        raise DataValueError(f"size={size!r} is unknown; possible: 'small', 'large'")
    chosen = np.ones(np.shape(labels), dtype=bool) if tissue is None else np.asarray(tissue, dtype=bool)
    if not chosen.any():
        raise DataValueError("no pixel lies in tissue")
    found, inverse = np.unique(np.asarray(labels)[chosen], return_inverse=True)
    mean = np.bincount(inverse, weights=np.asarray(gene_band, dtype=np.float64)[chosen]) / np.bincount(inverse)
    order = np.argsort(-mean, kind="stable")
    found, mean = found[order], mean[order]
    if not mean[0] > 0:
        raise DataValueError("the gene band is 0 everywhere; no label shows the markers")
    targets = found[mean > mean[0] / (2 if size == "small" else 3)]
    return targets, np.column_stack([found, mean])
