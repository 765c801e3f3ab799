"""The number of directions that the gradients of a training span, and the angles between them.

The analysis of arXiv 2202.00280, section 2: N95-PCA and N99-PCA are the numbers of principal
components that explain 95 % and 99 % of the variance of the gradients of epochs 1 to T. Heat maps
show the cosines of the gradients with the principal components, and with each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbgm_compress._util.files import atomic_write
from lbgm_compress.analysis import principal, tables
from lbgm_compress.analysis.checks import check_gradients
from lbgm_compress.analysis.gram import GramMatrices, Matrix
from lbgm_compress.analysis.results import check_one_per_epoch
from lbgm_compress.analysis.storage import FileRows, Layout, MemoryRows, Rows, Slot

__all__ = ["GradientSpace"]

FORMAT = 1
STATE = {
    "format",
    "per_layer",
    "projection",
    "seed",
    "in_file",
    "shapes",
    "count",
    "gram",
    "rows",
}


class GradientSpace:
    """The space that the gradients of a training span, one gradient an epoch.

    With the gradients g_1, ..., g_T as rows of a matrix, the principal components are its right
    singular vectors and the variances the squares of its singular values: no mean over epochs is
    subtracted. (The published code of the paper subtracts from each gradient the mean of its own
    entries, which is next to nothing.) All results follow from the Gram matrix, the inner products
    of the gradients with each other. A query brings the Gram matrix up to date: it reads all
    gradients once, and computes the products with those that are new.

    The gradients are kept in memory as float32; with `file` they are kept in a file; with
    `projection` a few numbers are kept of each.

    Parameters
    ----------
    per_layer
        If True, analyse each named tensor, called a layer here, as well as the whole gradient.
    projection
        Number d of projected entries to keep of each gradient (of each layer's gradient with
        `per_layer`), in the place of all entries. A gradient with at most d entries is kept as it
        is.
    file
        File in which to keep the gradients, 4 bytes an entry, one after the other, tensors in the
        order of the first gradient. Resident memory then grows by at most
        4 n + 64 MiB + 24 T² (L + 4) bytes, for n entries and L layers (1 without `per_layer`). With
        `projection` instead, 8 d T L bytes are added to that; with neither, 4 n T bytes.
    seed
        Seed of the projection.

    Raises
    ------
    ValueError
        If `projection` is not positive, or `file` is given as well.

    Notes
    -----
    The projection S is a count sketch (Charikar, Chen and Farach-Colton 2002; feature hashing,
    arXiv 0902.2206): every entry is added, with a random sign, to one of d random bins. The inner
    product of two projected gradients is unbiased, with variance
    (|x|²|y|² + <x, y>² - 2 Σ x_i² y_i²) / d, so that its standard deviation is at most
    sqrt(2 / d) |x| |y|. The standard deviation of a cosine c is, to first order, at most
    (1 - c²) / sqrt(d).

    If the gradients span r dimensions with orthonormal basis U, let eps be the spectral norm of
    UᵀSᵀSU - I. The mean square of eps is at most r (r + 1) / d; eps is near 2 sqrt(r / d) where
    energies are spread over many more entries than d. Every variance is then off by a factor
    between 1 - eps and 1 + eps. For every k, the share m of the variance that the k leading
    components miss is off by a factor between (1 - eps) / (1 + eps) and (1 + eps) / (1 - eps). The
    number of components found for a missed share m therefore lies between the exact numbers for
    m (1 + eps) / (1 - eps) and m (1 - eps) / (1 + eps).

    Examples
    --------
    >>> import torch
    >>> space = GradientSpace()
    >>> for epoch in range(4):
    ...     space.add({"weight": torch.tensor([[1.0, epoch]]), "bias": torch.tensor([2.0])})
    >>> space.rank(), space.components(0.95), space.history(0.95)
    (2, 2, [1, 1, 2, 2])
    >>> space.cosines()[0].round(2).tolist()
    [1.0, 0.91, 0.75, 0.6]
    """

    def __init__(
        self,
        *,
        per_layer: bool = False,
        projection: int | None = None,
        file: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        if projection is not None and projection < 1:
            raise ValueError(f"projection must be at least 1, not {projection}")
        if projection is not None and file is not None:
            raise ValueError(
                "projected gradients are small and stay in memory: give projection or file"
            )
        self.per_layer = per_layer
        self.projection = projection
        self.file = None if file is None else Path(file)
        self.seed = seed
        self._rows: Rows
        if self.file is not None:
            self._rows = FileRows(self.file)
        elif projection is None:
            self._rows = MemoryRows()
        else:
            self._rows = MemoryRows(np.float64, seed)
        self._gram = GramMatrices()

    def __len__(self) -> int:
        return self._rows.count

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by name, as in the first gradient."""
        return dict(self._rows.layout.shapes)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the tensors, as in the first gradient; empty without `per_layer`."""
        return tuple(self._rows.layout.shapes) if self.per_layer else ()

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Add the gradient of another epoch.

        Parameters
        ----------
        grads
            Dense tensors by name (float32, float16, bfloat16 or float64, on any device), with the
            names and shapes of the first gradient, in any order. They are rounded to float32,
            unless they are projected. A gradient of zeros alone has cosine 0 with everything.

        Raises
        ------
        TypeError
            If something is not a dense floating-point tensor.
        ValueError
            If names or shapes differ from the first gradient's, or an entry is inf, nan or beyond
            float32.
        FileExistsError
            If this is the first gradient and `file` has content already.
        OSError
            If `file` cannot be written. After any of these errors the space is as it was.
        """
        layout = self._rows.layout
        check_gradients(grads, layout.shapes)
        if not layout.shapes:
            layout = self._layout({name: tuple(grad.shape) for name, grad in grads.items()})
        self._rows.append(grads, layout)

    def components(self, share: float = 0.95, layer: str | None = None) -> int:
        """Return the number of principal components that explain a share of the variance.

        Parameters
        ----------
        share
            Above 0, at most 1; a difference of one part in 10⁹ is taken for rounding.
        layer
            One of `layers`, or None for the whole gradient.

        Returns
        -------
        int
            The smallest such number; 0 if all gradients are zero or there is none.
        """
        principal.check_share(share)
        [spectrum] = self._spectra(layer, [len(self)])
        return principal.smallest_count(spectrum, share)

    def history(self, share: float = 0.95, layer: str | None = None) -> list[int]:
        """Return `components` after each epoch, of the gradients added until then."""
        principal.check_share(share)
        spectra = self._spectra(layer, range(1, len(self) + 1))
        return [principal.smallest_count(spectrum, share) for spectrum in spectra]

    def explained(self, layer: str | None = None) -> Matrix:
        """Return the shares of variance that the principal components explain (T, descending)."""
        [spectrum] = self._spectra(layer, [len(self)])
        return principal.explained(spectrum)

    def rank(self, tolerance: float = 1e-12, layer: str | None = None) -> int:
        """Return the number of components that explain more than a share of `tolerance` each.

        Rounding to float32 alone makes components of about 1e-15, rounding to float16 of about
        1e-8 and to bfloat16 of about 1e-6.
        """
        return int((self.explained(layer) > tolerance).sum())

    def cosines(self, layer: str | None = None) -> Matrix:
        """Return the cosines of the gradients with each other (T, T)."""
        return principal.cosines(self._matrix(layer))

    def principal_cosines(
        self, share: float = 0.99, *, count: int | None = None, layer: str | None = None
    ) -> Matrix:
        """Return the cosines between gradients and leading principal components.

        With u_k the k-th eigenvector of the Gram matrix and s_k² its eigenvalue, the k-th principal
        component is Σ_t u_tk g_t / s_k, and its cosine with g_t is s_k u_tk / |g_t|. The sign of a
        component makes its cosine positive with the gradient that has the largest part along it.
        Components of equal variance are arbitrary directions of the space that they span.

        Parameters
        ----------
        share
            Share of the variance that the components are to explain.
        count
            Number of components; replaces `share`.
        layer
            One of `layers`, or None for the whole gradient.

        Returns
        -------
        ndarray
            float64 (T, N), gradients by components.

        Raises
        ------
        ValueError
            If `count` is not from 0 to T, `share` not above 0 and at most 1, or there is no such
            layer.
        """
        if count is None:
            count = self.components(share, layer)
        elif not 0 <= count <= len(self):
            raise ValueError(f"count must be from 0 to {len(self)}, not {count}")
        return principal.principal_cosines(self._matrix(layer), count)

    def write_csv(
        self,
        folder: str | os.PathLike[str],
        metrics: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Write components.csv, cosines.csv and principal_cosines.csv.

        components.csv has a row for each layer and epoch, with N95-PCA and N99-PCA of the gradients
        until then and the metrics. The other files are matrices, with a row for each layer and
        epoch and a column for each epoch, or for each component until 99 % of the variance. The
        layer ``whole`` is the whole gradient.

        Parameters
        ----------
        folder
            An existing folder.
        metrics
            Further columns of components.csv, for example accuracy: a number for each epoch.

        Raises
        ------
        ValueError
            If a metric does not have one number for each epoch, or has the name of a column.
        """
        tables.write_csv(self, folder, {} if metrics is None else metrics)

    def plot(
        self,
        folder: str | os.PathLike[str],
        accuracy: Sequence[float] | None = None,
        title: str | None = None,
    ) -> None:
        """Draw components.png, principal.png and cosines.png, the figures of the paper.

        components.png has N95-PCA and N99-PCA against epochs, beside accuracy; principal.png is a
        heat map of cosines between gradients and the principal components that explain 99 % of the
        variance; cosines.png is one of cosines between gradients. With `per_layer` there is a panel
        for each layer (the eleven largest, if there are more) beside the whole gradient's.

        Parameters
        ----------
        folder
            An existing folder.
        accuracy
            A number from 0 to 1 for each epoch.
        title
            Title of the figures, such as the name of the model.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no gradient, or `accuracy` does not have a number for each.
        """
        try:
            from lbgm_compress.analysis import plots
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        if not len(self):
            raise ValueError("no gradient was added: there is nothing to draw")
        if accuracy is not None:
            check_one_per_epoch(self, {"accuracy": accuracy})
        for name, data in plots.draw(self, accuracy, title).items():
            atomic_write(Path(folder) / name, data)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of numbers and tensors, which are not copied.

        It survives `torch.save` and ``torch.load(weights_only=True)``. With `file` it holds the
        Gram matrix, which is brought up to date, and not the gradients.
        """
        self._update()
        return {
            "format": FORMAT,
            "per_layer": self.per_layer,
            "projection": self.projection,
            "seed": self.seed,
            "in_file": self.file is not None,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "count": len(self),
            "gram": torch.from_numpy(self._gram.matrices),
            "rows": self._rows.in_memory(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that `state_dict` returned.

        Gradients that `file` holds beyond those of the state are overwritten by the next ones.

        Raises
        ------
        ValueError
            If the state is that of other arguments or not such a state, or `file` does not hold its
            gradients. The space is then as it was.
        """
        known = isinstance(state, Mapping) and set(state) == STATE
        if not known or state["format"] != FORMAT:
            raise ValueError(f"this is no state of a GradientSpace of format {FORMAT}")
        own = {"per_layer": self.per_layer, "projection": self.projection}
        own["in_file"] = self.file is not None
        if self.projection is not None:
            own["seed"] = self.seed
        for name, expected in own.items():
            if state[name] != expected:
                raise ValueError(
                    f"the state has {name}={state[name]}, expected {expected}: build the "
                    "GradientSpace with the arguments of the one that was saved"
                )
        layout = self._layout({name: tuple(shape) for name, shape in state["shapes"].items()})
        count, gram = state["count"], state["gram"].numpy()
        parts = (len(layout.shapes) if self.per_layer else 1) if count else 0
        if gram.shape != (parts, count, count):
            raise ValueError("the state's tensors do not have the shapes that it names")
        self._rows.check(state["rows"], count, layout)
        self._rows.replace(state["rows"], count, layout)
        self._gram = GramMatrices(gram)

    def _layout(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        return Layout.of(shapes, self.projection, self.per_layer)

    def _update(self) -> None:
        """Bring the Gram matrices up to date."""
        layout = self._rows.layout
        whole = Slot(0, layout.length, projected=False)
        self._gram.update(self._rows, list(layout.slots.values()) if self.per_layer else [whole])

    def _matrix(self, layer: str | None) -> Matrix:
        """Return the Gram matrix (T, T) of one layer or of the whole gradient."""
        part = self._part(layer)
        self._update()
        return self._gram.matrix(part)

    def _spectra(self, layer: str | None, counts: Sequence[int]) -> list[Matrix]:
        """Return, for each count, the variances (descending) of that many first gradients."""
        part = self._part(layer)
        self._update()
        return self._gram.spectra(part, counts)

    def _part(self, layer: str | None) -> int | None:
        """Return the number of a layer's Gram matrix, None for the whole gradient."""
        if layer is None:
            return None
        if layer in self.layers:
            return self.layers.index(layer)
        if not self.per_layer:
            raise ValueError(f"layer={layer!r} needs a GradientSpace with per_layer=True")
        names = ", ".join(self.layers[:5]) + (", ..." if len(self.layers) > 5 else "")
        raise ValueError(f"there is no layer {layer!r}, the layers are {names}")
