"""Statistics of clients' replies."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lbgm_compress._util.units import human_bytes

__all__ = ["Statistics"]


@dataclass
class Statistics:
    """Counts and sizes of the replies of a round, or of several."""

    replies: int = 0
    failed: int = 0
    """Replies that arrived as errors."""
    rejected: int = 0
    """Replies that the server turned into errors."""
    uplink: int = 0
    """Bytes of all other replies, as they travelled."""
    dense: int = 0
    """Bytes of the same replies without compression."""
    recycled: int = 0
    """Tensors sent as look-back coefficients alone."""
    tensors: int = 0
    """Tensors sent as compressed updates."""

    @property
    def recycled_share(self) -> float:
        """Share of the compressed tensors that were recycled; 0 if there were none."""
        return self.recycled / self.tensors if self.tensors else 0.0

    def add(self, other: Statistics) -> None:
        """Add other statistics to these, in place."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def metrics(self) -> dict[str, int | float]:
        """Return the entries for the aggregated MetricRecord of a round."""
        return {
            "uplink-bytes": self.uplink,
            "dense-bytes": self.dense,
            "recycled-share": self.recycled_share,
            "rejected-replies": self.rejected,
        }

    def __str__(self) -> str:
        share = f", {self.uplink / self.dense:.2%} of dense" if self.dense else ""
        return f"{human_bytes(self.uplink)}{share}"
