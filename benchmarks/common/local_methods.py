"""The methods of `benchmarks/local_training.py`."""

from __future__ import annotations

from dataclasses import dataclass

from lbgm_compress import Compressor, ErrorFeedback, Identity, LookBackSubspace, SignSGD, TopK

__all__ = ["DENSE", "METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A way to train a language model on several workers.

    With `compressor`, it is `lbgm_compress.adapters.diloco.DiLoCo`.
    """

    compressor: Compressor | None = None
    residual: str = "memory"
    final: Compressor | None = None
    outer_lr: float = 0.7
    outer_momentum: float = 0.75
    inner: str = "adamw"
    """Inner optimizer: "adamw", or "muon" for matrices (arXiv 2505.23725)."""
    power_rank: int = 0
    """If above 0, DiLoCo with PowerSGD of this rank in the place of a compressor."""
    every_step: str = ""
    """"adamw" or "demo": gradients are averaged in every step, and there are no local ones."""
    alone: bool = False
    """If there is no exchange but the last."""
    text: str = ""
    """What it is, for the page."""


FINAL = TopK(1.0, "int2")
DENSE = "dense"
METHODS = {
    DENSE: Method(Identity(), text="DiLoCo in float32"),
    "dense (0.7 / 0.9)": Method(
        Identity(), outer_momentum=0.9, text="with the outer momentum of its paper"
    ),
    "float16": Method(TopK(1.0, "float16"), text="DiLoCo in float16"),
    "4 bits": Method(TopK(1.0, "int4"), text="as Streaming DiLoCo, with error feedback"),
    "2 bits": Method(TopK(1.0, "int2"), text="2 bits with error feedback"),
    "signs": Method(SignSGD(scaled=True), text="one bit with error feedback"),
    "PowerSGD 4": Method(power_rank=4, text="rank 4 in float32, error feedback"),
    "SparseLoCo": Method(
        ErrorFeedback(TopK(1 / 64, "int2", chunk=4096), decay=0.95),
        outer_lr=1.0,
        outer_momentum=0.5,
        text="64 of each 4,096, two bits, decay 0.95",
    ),
    "top 1/64 in memory": Method(TopK(1 / 64, "int2"), outer_lr=1.0, outer_momentum=0.5),
    "subspaces in memory": Method(LookBackSubspace(8, 0.5, refresh=8, values="int4")),
    "top 1/20 in model": Method(TopK(1 / 20, "sign"), "model", TopK(1.0, "int4"), 1.0, 0.65),
    "top 1/25 in model": Method(TopK(1 / 25, "sign"), "model", FINAL, 1.0, 0.65),
    "top 1/66 in model": Method(TopK(1 / 66, "sign"), "model", FINAL, 1.0, 0.65),
    "top 1/300 in model": Method(TopK(1 / 300, "sign"), "model", FINAL, 1.0, 0.8),
    "subspaces in model": Method(
        LookBackSubspace(4, 0.5, refresh=4, values="int2"), "model", FINAL, 1.0, 0.5
    ),
    "alone": Method(Identity(), "model", FINAL, alone=True, text="no exchange but the last"),
    "DeMo": Method(every_step="demo", text="signs of DCT coefficients, every step"),
    "data-parallel": Method(every_step="adamw", text="AdamW, gradients averaged every step"),
    "dense with Muon": Method(Identity(), inner="muon"),
    "2 bits with Muon": Method(TopK(1.0, "int2"), inner="muon", text="as MuLoCo"),
    "top 1/300 in model with Muon": Method(
        TopK(1 / 300, "sign"), "model", FINAL, 1.0, 0.8, inner="muon"
    ),
}
