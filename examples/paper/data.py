"""EDM's data sets, read from disk image by image, and which images an iteration takes."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageArchive(Dataset):
    """A zip file of EDM's ``dataset_tool.py``. It stays on disk: ImageNet in float32 would take 63 GB a process.

    Args:
        path: The file.
        resolution: Height and width that images must have.
        label_dim: Number of classes, 0 for none.

    Attributes:
        fingerprint: Tells the data set from others, by its directory, check sums included.
    """

    def __init__(self, path: Path, resolution: int, label_dim: int = 0) -> None:
        self.path, self.resolution, self.label_dim = path, resolution, label_dim
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"--data: expected a zip file of EDM's dataset_tool.py, got {path}: {error}") from error
        entries = sorted(self.archive.infolist(), key=lambda entry: entry.filename)
        self.names = [
            e.filename for e in entries if e.filename.lower().endswith(IMAGES) and "__MACOSX" not in e.filename
        ]
        if not self.names:
            raise SystemExit(f"--data: expected png, jpg, webp or bmp images in {path}, found none")
        self.fingerprint = hashlib.sha256(repr([(e.filename, e.CRC) for e in entries]).encode()).hexdigest()[:16]
        self.pixels(0)
        self.classes = self._classes() if label_dim else None

    def _classes(self) -> Tensor:
        """Return the class of each image, from dataset.json."""
        wanted = (
            f"--data: the teacher has {self.label_dim} classes, which need a dataset.json with a label of each image"
        )
        try:
            labels = json.loads(self.archive.read("dataset.json"))["labels"]
            if not labels:
                raise SystemExit(
                    f"{wanted}, got one without labels: make it with EDM's dataset_tool.py from labelled data"
                )
            of = dict(labels)
            classes = [of[name] for name in self.names]
        except KeyError as error:
            raise SystemExit(f"{wanted}, got {self.path} without {error}") from error
        except (ValueError, TypeError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{wanted}, got one that cannot be read: {error}") from error
        wrong = next((c for c in classes if type(c) is not int or not 0 <= c < self.label_dim), None)
        if wrong is not None:
            raise SystemExit(f"{wanted} from 0 to {self.label_dim - 1}, got {wrong!r}")
        return torch.tensor(classes)

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: int) -> np.ndarray:
        """Return an image, checked. Shape ``(height, width, 3)``, uint8; a ValueError, which estimates pass on."""
        try:
            pixels = np.asarray(Image.open(io.BytesIO(self.archive.read(self.names[index]))).convert("RGB"))
        # encrypted or compressed in another way, too
        except (OSError, UnidentifiedImageError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise ValueError(f"--data: image {self.names[index]} of {self.path} cannot be read: {error}") from error
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise ValueError(
                f"--data: expected images of {self.resolution} pixels, the teacher's, got {self.names[index]} with "
                f"{pixels.shape[1]}x{pixels.shape[0]}: make the zip file with dataset_tool.py "
                f"--resolution={self.resolution}x{self.resolution}"
            )
        return pixels

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        """Return an image in [-1, 1], shape ``(3, height, width)``, and its label, one-hot, where there are classes."""
        image = torch.from_numpy(self.pixels(index).transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1
        if self.classes is None:
            return image
        return image, torch.nn.functional.one_hot(self.classes[index], self.label_dim).float()


class Batches:
    """The images of each iteration: every epoch in an order of its own, whatever the number of processes.

    Args:
        images: The data set.
        batch_size: Images of an iteration, over all processes.
        seed: Of the order.
    """

    def __init__(self, images: ImageArchive, batch_size: int, seed: int) -> None:
        self.images, self.batch_size = images, batch_size
        self.order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(images)))

    def share(self, iteration: int, rank: int, share: int) -> tuple[Tensor, Tensor | None]:
        """Return a process's images in an iteration, and their labels.

        Read when they are needed, not ahead: decoding a process's 64 takes milliseconds, an iteration seconds.
        """
        first = iteration * self.batch_size + rank * share
        places = (divmod(number, len(self.images)) for number in range(first, first + share))
        samples = [self.images[int(self.order(epoch)[row])] for epoch, row in places]
        if self.images.classes is None:
            return torch.stack(samples), None
        pictures, labels = zip(*samples, strict=True)
        return torch.stack(pictures), torch.stack(labels)
