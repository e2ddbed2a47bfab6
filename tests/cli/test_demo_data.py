"""The demo's images: real loading code, tried on small files of the real layout."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from sharpkit.cli.demo import load_images, read_idx


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, n in (("train", 12), ("t10k", 6)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


def test_fashion_mnist_is_read_halved_and_scaled(folder: Path) -> None:
    images = load_images("fashion-mnist", folder=folder, num_train=10, num_test=5)
    assert tuple(images.train_x.shape) == (10, 1, 14, 14)
    assert images.train_y.tolist() == list(range(10))
    assert tuple(images.test_x.shape) == (5, 1, 14, 14)
    assert abs(float(images.train_x.mean())) < 1e-5  # float32 rounding of a mean of 1960 numbers
    assert float(images.train_x.std()) == pytest.approx(1, abs=1e-5)


def test_idx_keeps_every_byte(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)


def test_digits_have_no_image_in_both_parts() -> None:
    pytest.importorskip("sklearn")
    images = load_images("digits", num_train=1000, num_test=500)
    assert tuple(images.train_x.shape) == (1000, 1, 8, 8)
    assert len(images.test_x) == 500
    assert set(images.train_y.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "not a whole gzip file"),
        (gzip.compress(bytes(range(200)) * 50)[:60], "not a whole gzip file"),
        (gzip.compress(b"\x00\x00\x0d\x01"), "not an IDX file of unsigned bytes: it begins with 00000d01"),
        (gzip.compress(b""), "begins with nothing"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05ab"), r"should hold \(5,\) bytes by its header, it holds 2"),
    ],
    ids=["plain", "cut short", "of another type", "empty", "too few values"],  # names: gzip writes the time into its bytes
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "bad.gz")


def test_missing_files_and_unknown_names_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data-folder"):
        load_images("fashion-mnist", folder=tmp_path)
    with pytest.raises(ValueError, match="got 'cifar'"):
        load_images("cifar")
