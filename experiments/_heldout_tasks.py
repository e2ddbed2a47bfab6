"""Small tasks on which no constant of sharpkit was chosen, shared by the experiments that judge its predictions.

Each experiment says which of them a choice of its own has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional as F

from experiments._learner_tasks import fashion_task
from experiments._models import mlp, seeded

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HeldOutTask:
    """What is trained and on what.

    Attributes:
        name: key in :data:`TASKS`.
        make: seed -> freshly initialised network, in train mode.
        loss: (output, target) -> mean loss.
        train, test: (inputs, targets), standardised by the training part.
    """

    name: str
    make: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Pair
    test: Pair

    @property
    def size(self) -> int:
        """Number of training samples."""
        return len(self.train[1])


def _split(x: np.ndarray, y: np.ndarray, count: int, *, regression: bool = False) -> tuple[Pair, Pair]:
    """``count`` samples in an order of our own and the others."""
    order = np.random.default_rng(0).permutation(len(x))
    inputs, targets = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    inputs = (inputs - inputs[:count].mean(dim=0)) / inputs[:count].std(dim=0)
    if regression:
        targets = targets.float()[:, None]
        targets = (targets - targets[:count].mean()) / targets[:count].std()
    return (inputs[:count], targets[:count]), (inputs[count:], targets[count:])


def wine() -> HeldOutTask:
    """178 wines of three cultivars, 128 to train on."""
    from sklearn.datasets import load_wine

    parts = _split(*load_wine(return_X_y=True), 128)
    return HeldOutTask("wine", lambda seed: seeded(lambda: mlp((13, 40, 40, 3)), seed), F.cross_entropy, *parts)


def breast_cancer() -> HeldOutTask:
    """569 biopsies, 420 to train on."""
    from sklearn.datasets import load_breast_cancer

    parts = _split(*load_breast_cancer(return_X_y=True), 420)
    return HeldOutTask("breast cancer", lambda seed: seeded(lambda: mlp((30, 40, 40, 2)), seed), F.cross_entropy, *parts)


def diabetes() -> HeldOutTask:
    """442 patients, 352 to train on; regression, a constant's loss is 1."""
    from sklearn.datasets import load_diabetes

    parts = _split(*load_diabetes(return_X_y=True), 352, regression=True)
    return HeldOutTask("diabetes", lambda seed: seeded(lambda: mlp((10, 40, 40, 1)), seed), F.mse_loss, *parts)


def breast_cancer_norm() -> HeldOutTask:
    """The same biopsies with batch norm after both hidden layers."""

    def network() -> nn.Module:
        layers = [nn.Linear(30, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 2)]
        return nn.Sequential(*layers)

    task = breast_cancer()
    return HeldOutTask("breast cancer, batch norm", lambda seed: seeded(network, seed), task.loss, task.train, task.test)


def mnist1d() -> HeldOutTask:
    """Ten kinds of noisy curves of 40 points, 2000 to train on, for a small convolutional network."""
    x, y = _curves(3000, seed=0)

    def network() -> nn.Module:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, 40))]
        for channels in (1, 16, 16):
            layers += [nn.Conv1d(channels, 16, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 10))

    parts = ((x[:2000], y[:2000]), (x[2000:], y[2000:]))
    return HeldOutTask("mnist1d", lambda seed: seeded(network, seed), F.cross_entropy, *parts)


def fashion_norm() -> HeldOutTask:
    """4000 images of 7 x 7 for a residual network with batch norm."""
    task = fashion_task()
    return HeldOutTask("fashion, batch norm", task.make, F.cross_entropy, task.train, task.test)


# Heights that a pen passes at twelve times while it writes the digits 0 to 9, from the left; drawn by us.
_TEMPLATES = (
    (0, 0.6, 1, 1.3, 1.4, 1.5, 1.5, 1.4, 1.3, 1, 0.6, 0),
    (0, -1.2, -1.2, -0.9, -0.6, -0.3, 0, 0.3, 0.6, 0.9, 0, 0),
    (0, 0.8, 1.2, 1.1, 0.7, 0.2, -0.3, -0.8, -1.2, -1.1, -0.6, 0),
    (0, 0.8, 1.2, 1.1, 0.6, 0, 0, 0.6, 1.1, 1.2, 0.8, 0),
    (0, -0.4, -0.8, -1.2, -1.5, -1.5, 0, 0.1, 0, -0.7, -1.3, -1.8),
    (0, -1.3, -1.3, -1.2, -1.2, 0, 0.8, 1.1, 1.2, 0.8, -0.4, 0),
    (0, -0.6, -1, -1.3, -1.4, -1.5, -1.5, -1.4, -1.3, -1, -0.6, 0),
    (0, 1.4, 1.4, 1.1, 0.8, 0.5, 0.2, -0.1, -0.4, -0.7, 0, 0),
    (0, -0.7, -1.1, -1.1, -0.7, 0, 0, -0.7, -1.1, -1.1, -0.7, 0),
    (0, -0.7, -1.1, -1.1, -0.6, 0, 0, 0, 0, -0.2, -0.5, 0),
)


def _curves(count: int, *, seed: int) -> Pair:
    """Curves after the description of MNIST-1D: templates stretched, scaled, sheared, shifted round and put under smooth noise.

    References:
        Greydanus and Kobak (2020), arXiv 2011.14439; its code and templates are not used.
    """
    random = np.random.default_rng(seed)
    labels, grid, curves = random.permutation(count) % 10, np.arange(72), []
    for label in labels:
        length = random.integers(36, 61)
        template = np.interp(np.linspace(0, 11, length), np.arange(12), _TEMPLATES[label])
        curve = np.pad(template * (1 + 0.4 * random.uniform(-1, 1)), (0, 72 - length))
        curve = np.roll(curve, random.integers(0, 49)) + 0.75 * random.uniform(-1, 1) * np.linspace(-0.5, 0.5, 72)
        noise = gaussian_filter1d(random.standard_normal(72), 2.0)
        curve = curve + 0.25 * noise / noise.std() + 0.02 * random.standard_normal(72)
        curves.append(np.interp(np.linspace(0, 71, 40), grid, curve))
    x = torch.tensor(np.array(curves), dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(labels)


TASKS: dict[str, Callable[[], HeldOutTask]] = {
    "wine": wine,
    "breast cancer": breast_cancer,
    "diabetes": diabetes,
    "mnist1d": mnist1d,
    "breast cancer, batch norm": breast_cancer_norm,
    "fashion, batch norm": fashion_norm,
}


@cache
def task_of(name: str) -> HeldOutTask:
    """Made once a process."""
    return TASKS[name]()
