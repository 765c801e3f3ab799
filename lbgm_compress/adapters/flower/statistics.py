"""Statistics of a round's messages and replies."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lbgm_compress._util.units import human_bytes

__all__ = ["Statistics"]


@dataclass
class Statistics:
    """Counts and sizes of the messages and replies of a round, or of several."""

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
    downlink: int = 0
    """Bytes of all messages to clients: arrays, as they travel, and requests."""
    downlink_dense: int = 0
    """Bytes of the arrays of these messages without compression."""

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
            **self.downlink_metrics(),
        }

    def downlink_metrics(self) -> dict[str, int | float]:
        """Return the entries that are about the messages to clients."""
        return {"downlink-bytes": self.downlink, "downlink-dense-bytes": self.downlink_dense}

    def directions(self) -> dict[str, str]:
        """Return the size of what went up, down and both ways, and its share of dense."""
        up, down = (self.uplink, self.dense), (self.downlink, self.downlink_dense)
        both = up[0] + down[0], up[1] + down[1]
        found = {"Uplink": up, "Downlink": down, "Both": both}
        return {name: _share(*sizes) for name, sizes in found.items()}


def _share(sent: int, dense: int) -> str:
    return human_bytes(sent) + (f", {sent / dense:.2%} of dense" if dense else "")
