"""Real images for the demo, from what is installed: scikit-learn's digits, or Fashion-MNIST in its IDX files."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
DATASETS = ("digits", "fashion-mnist")
_IDX_UINT8 = 0x08


@dataclass(frozen=True)
class Images:
    """A small image classification set.

    Attributes:
        train_x: (n, 1, side, side) float32, zero mean and unit variance over the set.
        train_y: (n,) int64 classes.
        test_x: (m, 1, side, side).
        test_y: (m,).
        name: in words, with the sizes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    name: str

    @property
    def side(self) -> int:
        return int(self.train_x.shape[-1])

    def to(self, device: str) -> Images:
        parts = (self.train_x, self.train_y, self.test_x, self.test_y)
        train_x, train_y, test_x, test_y = (part.to(device) for part in parts)
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
    mean, std = parts[0].mean(), parts[0].std()
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
        parts += [torch.nn.functional.avg_pool2d(images, 2), labels]
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
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, _IDX_UINT8]):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {content[:4].hex() or 'nothing'}, expected 000008..")
    dims = content[3]
    shape = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", count=dims, offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} should hold {shape} bytes by its header, it holds {values.size}")
    return values.reshape(shape)
