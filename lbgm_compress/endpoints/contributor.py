"""The end of a rank whose contributions are added up over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbgm_compress._util.ends import sorted_names
from lbgm_compress.algorithm import Algorithm, State
from lbgm_compress.compressor import check_gradient
from lbgm_compress.endpoints.store import Store
from lbgm_compress.endpoints.tensors import Sent
from lbgm_compress.reducible import Contribution, Sums
from lbgm_compress.wire.message import Kind

__all__ = ["Contributor"]

FULL, RECYCLED = int(Kind.BODY | Kind.SETS), int(Kind.USES)


class Contributor(Store[Any]):
    """The end of a rank whose contributions are added up over ranks.

    Parameters
    ----------
    algorithm
        A `Reducible`, or `ErrorFeedback` around one; the same on all ranks.

    Attributes
    ----------
    sent
        Statistics of the last round.
    """

    _owner = "a Contributor"
    _parts = ("state", "exponents")

    def __init__(self, algorithm: Algorithm) -> None:
        # All ranks draw the same random numbers.
        super().__init__(algorithm, seed=0)

    def begin(self, grads: Mapping[str, Tensor], loss_scale: float = 1.0) -> dict[str, Sums]:
        """Return the generators of a round by name, in sorted order: see `Reducible.average`.

        Parameters
        ----------
        grads
            Gradients by name, which do not change until the generators have ended.
        loss_scale
            The factor by which the loss was multiplied, and with it these gradients.

        Raises
        ------
        TypeError
            If a gradient is not a dense floating-point tensor.
        ValueError
            If there are no gradients, or one has another shape or dtype than before.
        """
        generators = {}
        for name in sorted_names(grads):
            grad = grads[name]
            check_gradient(grad, name)
            entry = self._known(name, grad)
            state: State = entry["state"]
            if entry["scale"] != loss_scale:
                state = self.compressor.rescale(state, loss_scale / entry["scale"])
            generators[name] = self.compressor.average(grad.detach(), state)
        return generators

    def keep(
        self,
        grads: Mapping[str, Tensor],
        found: Mapping[str, Contribution],
        exponents: Mapping[str, list[int]],
        sizes: Mapping[str, int],
        loss_scale: float = 1.0,
    ) -> None:
        """Replace states by those that generators returned.

        Parameters
        ----------
        grads
            The gradients that `begin` was given.
        found
            The results of the generators by name; of other tensors the state stays.
        exponents
            Exponents of the scales of the next sums of each tensor, in the order of the sums.
        sizes
            The bytes that each tensor added to sums.
        loss_scale
            As in `begin`.
        """
        self._replace(
            {
                name: {
                    **self._known(name, grads[name]),
                    "scale": loss_scale,
                    "state": result.state,
                    "exponents": exponents[name],
                }
                for name, result in found.items()
            }
        )
        names = list(sizes)
        kinds = [RECYCLED if n in found and found[n].recycled else FULL for n in names]
        errors = [found[n].phase_error if n in found else None for n in names]
        self.sent = Sent(names, kinds, errors, list(sizes.values()))

    def copy(self) -> Contributor:
        """Return an end with the same states, of which this one's next rounds change nothing."""
        other = Contributor(self.compressor)
        other._tensors = dict(self._tensors)
        return other

    def exponents(self, name: str) -> list[int]:
        """Return the exponents of the scales of a tensor's sums; see `keep`."""
        return list(self._tensors[name]["exponents"]) if name in self._tensors else []

    def rescaling(self, name: str, loss_scale: float) -> float:
        """Return a loss scale divided by that of a tensor's last round."""
        return loss_scale / self._tensors[name]["scale"] if name in self._tensors else 1.0

    def shared_alone(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a saved state without what its rank alone knew, such as a residual."""
        tensors = {
            name: {**entry, "state": self.compressor.shared_state(entry["state"])}
            for name, entry in state["tensors"].items()
        }
        return {**state, "tensors": tensors}

    def _known(self, name: str, grad: Tensor) -> dict[str, Any]:
        return {"exponents": [], **super()._known(name, grad)}

    def _forgotten(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._forgotten(entry), "exponents": []}

    def _identifier(self, name: str) -> int:
        entry = self._tensors[name]
        if not entry["exponents"]:
            return 0
        hashed = hashlib.blake2b(f"{entry['exponents']} ".encode(), digest_size=8)
        _add_to_hash(hashed, self.compressor.shared_state(entry["state"]))
        return int.from_bytes(hashed.digest(), "little")


def _add_to_hash(hashed: Any, value: Any) -> None:
    """Add a nested state to a hash."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            hashed.update(f"{key} ".encode())
            _add_to_hash(hashed, value[key])
    elif isinstance(value, Tensor):
        flat = value.detach().contiguous().view(-1).view(torch.uint8)
        hashed.update(flat.cpu().numpy().data)
    else:
        hashed.update(f"{value!r} ".encode())
