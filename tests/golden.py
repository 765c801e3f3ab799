"""Messages and sections of indices of wire version 1, recorded in golden.json.

"messages" are made in the same way now. "earlier" ones were made before a zero tensor (here, an
empty one and a scalar) was sent as a head alone, or before int2 had a choice of two scales. Both
decode.

``python -m tests.golden`` records the compressors of the list below that the file does not have.
Messages that it has stay: they must decode in every later release.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbgm_compress import Receiver, Sender
from lbgm_compress.compressors.parse import parse_compressor
from lbgm_compress.endpoints import sender as sending
from lbgm_compress.wire.indices import encode_indices

COMPRESSORS = [
    "Identity()",
    "TopK(0.3)",
    "TopK(0.3, values='int8')",
    "TopK(0.3, values='float16')",
    "SignSGD()",
    "SignSGD(scaled=True)",
    "Atomo(1)",
    "LBGM()",
    "LBGM(TopK(0.3, values='bfloat16'))",
    "LBGM(SignSGD())",
    "LBGM(Atomo(1))",
    "ErrorFeedback(LBGM(TopK(0.3)))",
    "TopK(0.3, values='int4')",
    "TopK(0.3, values='int2')",
    "LookBackSubspace(1, 0.2, view='flat', values='float32')",
    "LookBackSubspace(2, 0.05)",
    "LookBackSubspace(2, 0.05, refresh=2, values='int4', directions='int2')",
    "TopK(0.3, values='int2', chunk=8)",
    "TopK(0.3, values='sign')",
    "ErrorFeedback(TopK(0.3, chunk=16), decay=0.75)",
]
# Number of elements, and the step of the positions.
INDICES = [(100_000, 3), (900, 1), (2**33, 999)]


def gradients(round_: int) -> dict[str, Tensor]:
    """Return gradients of exact numbers, which are the same on every machine."""
    matrix = torch.tensor([[(7 * i + 3 * j * j) % 17 - 8 for j in range(9)] for i in range(6)])
    vector = torch.tensor([(5 * i * i) % 13 - 6 for i in range(20)])
    grads = {
        "matrix": matrix / 8 * (1 - round_ / 4) + round_ / 64,
        "half": (vector / 4 + round_ / 8).half(),
        "double": vector.double() / 3 if round_ < 2 else vector.double().flip(0) / 3,
        "scalar": torch.tensor(0.5 - round_ / 4),
        "empty": torch.zeros(0),
    }
    if round_ == 3:
        grads["matrix"][1, 2] = float("inf")
    return grads


def record(text: str, setattr_: Callable[..., Any] = setattr) -> dict[str, Any]:
    """Return the messages of five rounds, with fixed identifiers, and the decoded tensors."""
    compressor = parse_compressor(text)
    sender, receiver = Sender(compressor), Receiver(compressor, gradients(0))
    identifiers = iter(range(0x1122334455667788, 0x1122334455667799))
    setattr_(sending.secrets, "randbits", lambda bits: next(identifiers))
    rounds = []
    for round_ in range(5):
        message = sender.compress(gradients(round_))
        decoded = receiver.decompress("golden", message)
        rounds.append(
            {
                "message": bytes(message.tolist()).hex(),
                "decoded": {name: t.reshape(-1).tolist() for name, t in decoded.items()},
            }
        )
    return {"compressor": text, "rounds": rounds}


def positions(n: int, step: int) -> list[int]:
    """Return positions with growing gaps, so that blocks have different parameters."""
    return sorted({(i * i * step // 7) % n for i in range(300)})


def record_indices(n: int, step: int) -> dict[str, Any]:
    """Return a section of indices, and the arguments of `positions` for it."""
    section = encode_indices(torch.tensor(positions(n, step)), n)
    return {"n": n, "step": step, "section": bytes(section.tolist()).hex()}


if __name__ == "__main__":
    path = Path(__file__).parent / "golden.json"
    recorded = json.loads(path.read_text())
    known = {case["compressor"] for case in recorded["messages"]}
    recorded["messages"] += [record(text) for text in COMPRESSORS if text not in known]
    sections = {(case["n"], case["step"]) for case in recorded["indices"]}
    recorded["indices"] += [record_indices(*of) for of in INDICES if of not in sections]
    path.write_text(json.dumps(recorded, indent=1) + "\n")
