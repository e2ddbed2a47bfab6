"""The demo: train two small networks on real images and watch their curvature meet the stability limit."""

from __future__ import annotations

import gzip
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import SpectralDensity
from sharpkit.linalg.slq import spectral_density
from sharpkit.measuring.history import CurvatureHistory
from sharpkit.measuring.layers import LayerSharpness, per_layer
from sharpkit.measuring.sharpness import Sharpness, measure
from sharpkit.objective.objective import Objective
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import gradient_descent

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
DATASETS = ("digits", "fashion-mnist")
_IDX_UINT8 = 0x08  # third byte of an IDX file of unsigned bytes, by the format's definition


@dataclass(frozen=True)
class Images:
    """A small image classification set; ``name`` says which, with the sizes."""

    train_x: Tensor  # (n, 1, side, side) float32, zero mean and unit variance over the set
    train_y: Tensor  # (n,) int64 classes
    test_x: Tensor  # (m, 1, side, side), shifted and scaled as train_x is
    test_y: Tensor  # (m,)
    name: str

    @property
    def side(self) -> int:
        return int(self.train_x.shape[-1])

    def to(self, device: str) -> Images:
        train_x, train_y, test_x, test_y = (part.to(device) for part in (self.train_x, self.train_y, self.test_x, self.test_y))
        return Images(train_x, train_y, test_x, test_y, name=self.name)


def load_images(dataset: str, *, folder: Path | None = None, num_train: int = 1000, num_test: int = 500) -> Images:
    """A subset of the named data set, the same at every call.

    Args:
        dataset: ``"digits"`` (1797 images of 8 x 8, needs scikit-learn) or ``"fashion-mnist"`` (28 x 28, averaged to 14 x 14).
        folder: of Fashion-MNIST's four ``*-ubyte.gz`` files.
        num_train: training images.
        num_test: test images.

    Raises:
        ValueError: unknown name, or a damaged file.
        FileNotFoundError: the Fashion-MNIST files are not there.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if dataset == "digits":
        images, labels = _digits()
        train, test = slice(0, num_train), slice(num_train, num_train + num_test)
        parts = (images[train], labels[train], images[test], labels[test])
    elif dataset == "fashion-mnist":
        parts = _fashion_mnist(folder or FASHION_MNIST_FOLDER, num_train, num_test)
    else:
        raise ValueError(f"dataset must be one of {DATASETS}, got {dataset!r}")
    mean, std = parts[0].mean(), parts[0].std()  # of the training images alone: test images must not shape what is trained on
    scaled = ((parts[0] - mean) / std, parts[1], (parts[2] - mean) / std, parts[3])
    side = scaled[0].shape[-1]
    return Images(*scaled, name=f"{dataset} ({len(scaled[0])} training and {len(scaled[2])} test images of {side} x {side})")


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install 'sharpkit[demo]', or choose --dataset fashion-mnist"
        ) from error
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None], torch.tensor(digits.target, dtype=torch.int64)


def _fashion_mnist(folder: Path, num_train: int, num_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = []
    for stem, wanted in (("train", num_train), ("t10k", num_test)):
        images = torch.from_numpy(read_idx(folder / f"{stem}-images-idx3-ubyte.gz")[:wanted].astype(np.float32))[:, None]
        labels = torch.from_numpy(read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")[:wanted].astype(np.int64))
        parts += [F.avg_pool2d(images, 2), labels]  # to 14 x 14: a quarter of the pixels, so the demo takes minutes on a laptop
    return parts[0], parts[1], parts[2], parts[3]


def read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An IDX file of unsigned bytes, gzipped, as an array of the shape its header names.

    Args:
        path: such as ``train-images-idx3-ubyte.gz``.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not such a file, or it is cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: install Debian's package dataset-fashion-mnist, or name the folder of the four "
            "*-ubyte.gz files with --data-folder"
        )
    try:
        with gzip.open(path) as stream:
            content = stream.read()
    except (OSError, EOFError) as error:  # gzip raises EOFError, no OSError, where a download was cut short
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, _IDX_UINT8]):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {content[:4].hex() or 'nothing'}, expected 000008..")
    dims = content[3]  # the format: two zero bytes, type, number of dimensions, each dimension as big-endian uint32, then the values
    shape = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", count=dims, offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} should hold {shape} bytes by its header, it holds {values.size}")
    return values.reshape(shape)


Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """One training run of the demo by plain SGD; ``name`` goes into headings."""

    name: str
    build: Callable[[int], nn.Module]  # makes the network from the image's side length
    lr: float
    batch_size: int | None  # None trains on the full batch, which is gradient descent
    num_steps: int
    num_checkpoints: int  # measurements after the first one


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, with sentences for the top of the page."""

    sections: tuple[tuple[str, Any], ...]  # (heading, result) pairs in the order of the page
    notes: tuple[str, ...]
    seconds: float  # training and measuring


def build_mlp(side: int) -> nn.Module:
    """Two hidden tanh layers of 64 units: smooth, and small enough to follow closely."""
    first: dict[str, nn.Module] = {"flatten": nn.Flatten(), "hidden1": nn.Linear(side * side, 64), "tanh1": nn.Tanh()}
    second: dict[str, nn.Module] = {"hidden2": nn.Linear(64, 64), "tanh2": nn.Tanh()}
    return nn.Sequential(OrderedDict(**first, **second, output=nn.Linear(64, 10)))


def build_conv_net(side: int) -> nn.Module:
    """Two convolutions with GELU and average pooling, then one linear layer."""
    # GELU and average pooling have second derivatives everywhere; those of ReLU and of max pooling are 0 or undefined
    first: dict[str, nn.Module] = {"conv1": nn.Conv2d(1, 8, 3, padding=1), "gelu1": nn.GELU(), "pool1": nn.AvgPool2d(2)}
    second: dict[str, nn.Module] = {"conv2": nn.Conv2d(8, 16, 3, padding=1), "gelu2": nn.GELU(), "pool2": nn.AvgPool2d(2)}
    return nn.Sequential(OrderedDict(**first, **second, flatten=nn.Flatten(), output=nn.Linear(16 * (side // 4) ** 2, 10)))


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance to the one-hot target, averaged over samples; its curvature stays up while the fit improves."""
    return 0.5 * (output - F.one_hot(target, output.shape[-1]).to(output.dtype)).square().sum(dim=-1).mean()


def run_demo(
    *,
    dataset: str = "digits",
    folder: Path | None = None,
    quick: bool = False,
    device: str = "cpu",
    seed: int = 0,
    say: Say = lambda line: None,
) -> DemoResult:
    """Train an MLP by gradient descent and a conv net by minibatch SGD, measuring the full-batch Hessian on the way.

    Args:
        dataset: ``"digits"`` or ``"fashion-mnist"``.
        folder: of the Fashion-MNIST files.
        quick: fewer images, steps and checkpoints.
        device: ``"cpu"`` or ``"cuda"``.
        seed: of initial weights, batches and probes.
        say: receives one line of progress at a time.

    Raises:
        ValueError: unknown data set, or no such device here.
    """
    started = time.perf_counter()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but PyTorch sees no CUDA device here; use --device cpu")
    images = load_images(dataset, folder=folder, num_train=500 if quick else 1000).to(device)
    # by judgement: long enough that full-batch gradient descent reaches 2/lr, short enough for a few minutes on a laptop
    plans = (
        Plan("MLP, full batch", build_mlp, 0.1, None, 600 if quick else 1500, 8 if quick else 20),
        Plan("Conv net, batches of 64", build_conv_net, 0.1, 64, 600 if quick else 1500, 6 if quick else 15),
    )
    sections: list[tuple[str, Any]] = []
    accuracies = []
    for plan in plans:
        say(f"{plan.name}: {plan.num_steps} steps of SGD, lr {plan.lr}, on {images.name}")
        run = _Run(plan, images, seed=seed, quick=quick)
        sections += run.train(say)
        accuracies.append(f"{plan.name}: test accuracy {run.test_accuracy():.1%} after {plan.num_steps} steps.")
    seconds = time.perf_counter() - started
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "the CPU"
    notes = (f"Trained and measured on {images.name} in {seconds:.0f} s on {where}; half squared error, plain SGD.", *accuracies)
    return DemoResult(tuple(sections), notes, seconds)


class _Run:
    """One network in training, measured from time to time."""

    def __init__(self, plan: Plan, images: Images, *, seed: int, quick: bool) -> None:
        self.plan, self.images, self.seed, self.quick = plan, images, seed, quick
        with torch.random.fork_rng(devices=[]):  # initial weights draw from the global state, which is the caller's
            torch.manual_seed(seed)
            self.model = plan.build(images.side).to(images.train_x.device)
        self.optimizer = gradient_descent(self.model.parameters(), lr=plan.lr)
        self.batches = torch.Generator().manual_seed(seed)  # on the CPU: the same batches on every device
        self.objective = Objective(self.model, (images.train_x, images.train_y), loss=half_squared_error)
        self._warm_start: Tensor | None = None

    def train(self, say: Say) -> list[tuple[str, Any]]:
        """Train with checkpoints; then everything measured, under headings."""
        plan = self.plan
        density_at_start, layers_at_start = self._density(), self._layers()
        rows, done = [self._checkpoint(0)], 0
        for i in range(1, plan.num_checkpoints + 1):
            until = plan.num_steps * i // plan.num_checkpoints
            self._steps(until - done)
            done = until
            rows.append(self._checkpoint(done))
            say(f"  step {done:5d}  loss {rows[-1]['loss']:.4f}  lambda_max {rows[-1]['lambda_max']:7.3f}  2/lr {2 / plan.lr:.3g}")
        history = _history(rows, plan)
        sharpness = measure(self.objective, optimizer=self.optimizer, seed=self.seed)
        return [
            (f"{plan.name}: curvature over training", history),
            (f"{plan.name}: the whole Hessian at the end", _named(sharpness, plan.name)),
            (f"{plan.name}: spectrum at initialisation", _with_limit(density_at_start, plan)),
            (f"{plan.name}: spectrum after training", _with_limit(self._density(), plan)),
            (f"{plan.name}: layer by layer at initialisation", {**layers_at_start.to_dict(), "findings": []}),
            (f"{plan.name}: layer by layer after training", self._layers()),
        ]

    def _steps(self, count: int) -> None:
        x, y, size = self.images.train_x, self.images.train_y, self.plan.batch_size
        for _ in range(count):
            picked = torch.randint(len(x), (size,), generator=self.batches).to(x.device) if size is not None else slice(None)
            self.optimizer.zero_grad()
            torch.autograd.backward(half_squared_error(self.model(x[picked]), y[picked]))
            self.optimizer.step()

    def _checkpoint(self, step: int) -> dict[str, Any]:
        pairs = eigenpairs(HessianOperator(self.objective), k=1, tol=1e-3, seed=self.seed, initial=self._warm_start)
        self._warm_start = pairs.vectors  # the top direction turns slowly: from here the next checkpoint needs a few products
        return {
            "step": step,
            "loss": self.objective.value(),
            "lambda_max": float(pairs.values[0]),
            "residual": float(pairs.residuals[0]),
            "converged": bool(pairs.converged[0]),
            "num_matvecs": pairs.num_matvecs,
            "seconds": pairs.seconds,
        }

    def _density(self) -> SpectralDensity:
        probes, steps = (4, 40) if self.quick else (10, 80)  # by judgement; the second are the command line's own defaults
        return spectral_density(HessianOperator(self.objective), num_probes=probes, num_steps=steps, seed=self.seed)

    def _layers(self) -> LayerSharpness:
        return per_layer(self.objective, trace_rtol=0.05, seed=self.seed, name=self.plan.name)

    def test_accuracy(self) -> float:
        with torch.no_grad():
            return float((self.model(self.images.test_x).argmax(dim=1) == self.images.test_y).float().mean())


def _history(rows: list[dict[str, Any]], plan: Plan) -> CurvatureHistory:
    def series(name: str) -> tuple[Any, ...]:
        return tuple(row[name] for row in rows)

    return CurvatureHistory(
        steps=series("step"),
        loss=series("loss"),
        lambda_max=series("lambda_max"),
        residual=series("residual"),
        limit=(2 / plan.lr,) * len(rows),
        lr=(plan.lr,) * len(rows),
        name=plan.name,
        full_batch=plan.batch_size is None,
        converged=all(series("converged")),
        num_matvecs=sum(series("num_matvecs")),
        seconds=sum(series("seconds")),
    )


def _with_limit(density: SpectralDensity, plan: Plan) -> dict[str, Any]:
    """The density's document with the stability limit, which its picture then shows."""
    return {**density.to_dict(), "limit": 2 / plan.lr}


def _named(sharpness: Sharpness, name: str) -> dict[str, Any]:
    """The document with its findings under the run's name and without the density, which has a section of its own."""
    document = sharpness.to_dict()
    return {**document, "density": None, "findings": [f"{name}, at the end: {sentence}" for sentence in sharpness.findings()]}
