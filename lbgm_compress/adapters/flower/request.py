"""The request: the value that `CompressedStrategy` adds to the train message of a client.

A request is one value of type bytes in a ConfigRecord of the message: a JSON object, a zero byte,
and the digest of the state that the server holds of the client (`lbgm_compress.Receiver.digest`;
empty if it holds none). The object has these keys:

- ``version``: 1; 2 if `residual`, `downlink` or `first` is there, and 3 if `personal` is there too,
  which older clients must not ignore
- ``compressor``: the expression that builds the compressor (its repr)
- ``exclude``: a list of patterns for names of arrays
- ``training``: an identifier of the training, which a restored server keeps
- ``layout``: a hash, in hexadecimal digits, of the names, shapes and dtypes that the digest is for
- ``round``: the number of this round; rounds of a training are numbered from 1
- ``applied``: a number below ``round``. No reply of the client in a round after it went into the
  model. The client keeps its residual as it is for that round and those before it.

- ``residual``: ``"memory"`` or ``"model"``
- ``downlink``: the expression that builds the compressor of the downlink; null if the message has
  the model's arrays as they are
- ``first``: the precision in which a whole model travels
- ``personal``: the position, by name, of each personal array that is in the message; an empty
  object if the client has them already

``round`` and ``applied`` are not there if the client is asked more than once in the round, or by a
release that does not know them. Older clients ignore them. With a downlink or personal arrays, an
evaluate message has a request too.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from lbgm_compress.compressor import Compressor
from lbgm_compress.compressors.error_feedback import ErrorFeedback
from lbgm_compress.compressors.parse import BUILT_IN, LONGEST, parse_compressor
from lbgm_compress.endpoints.downlink import PRECISIONS

__all__ = ["ADDED", "KEY", "Request", "check_expression", "check_residual", "with_request"]

KEY = "lbgm_compress"
# The key of a request in a ConfigRecord that was added for the request alone.
ADDED = "lbgm_compress.added"
VERSION = 1
# The version of a request that says how the model travels, and what becomes of the residual.
BOTH_WAYS = 2
# The version of a request that says which arrays are personal.
PERSONAL = 3
RESIDUALS = "memory", "model"


@dataclass(frozen=True)
class Request:
    """The settings of the server for one client and round."""

    compressor: Compressor
    exclude: tuple[str, ...]
    training: str
    layout: bytes
    digest: bytes
    round: int | None = None
    applied: int = 0
    residual: str = "memory"
    downlink: Compressor | None = None
    first: str = "float32"
    personal: Mapping[str, int] | None = None
    """Positions of the personal arrays in the message; None if there are no personal arrays."""

    def pack(self) -> bytes:
        """Return the bytes that travel."""
        head: dict[str, Any] = {
            "version": VERSION,
            "compressor": repr(self.compressor),
            "exclude": self.exclude,
            "training": self.training,
            "layout": self.layout.hex(),
        }
        if self.downlink is not None or self.residual != "memory" or self.personal is not None:
            downlink = None if self.downlink is None else repr(self.downlink)
            head["version"] = BOTH_WAYS
            head |= {"residual": self.residual, "downlink": downlink, "first": self.first}
        if self.personal is not None:
            head |= {"version": PERSONAL, "personal": dict(self.personal)}
        if self.round is not None:
            head["round"], head["applied"] = self.round, self.applied
        return json.dumps(head).encode() + b"\0" + self.digest

    @staticmethod
    def unpack(data: Any, compressors: Sequence[type] = ()) -> Request:
        """Return the request that `pack` made bytes of.

        Parameters
        ----------
        data
            The bytes.
        compressors
            Further classes that the compressor's expression may name.

        Raises
        ------
        ValueError
            If `data` is not a request, is one of another version, or names a class that is not
            known.
        """
        if not isinstance(data, bytes):
            raise ValueError(f"a request is bytes, not {type(data).__name__}")
        text, _, digest = data.partition(b"\0")
        try:
            head = json.loads(text)
            version, training = head["version"], str(head["training"])
            layout = bytes.fromhex(head["layout"])
            expression, exclude = str(head["compressor"]), tuple(map(str, head["exclude"]))
            round_, applied = head.get("round"), head.get("applied", 0)
            residual, downlink, first, personal = "memory", None, "float32", None
            if version in (BOTH_WAYS, PERSONAL):
                residual, downlink, first = head["residual"], head["downlink"], head["first"]
            if version == PERSONAL:
                personal = {str(name): int(place) for name, place in head["personal"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"the request cannot be read: {error!r}") from None
        if version not in (VERSION, BOTH_WAYS, PERSONAL):
            raise ValueError(
                f"the server's request has version {version}, this client reads versions "
                f"{VERSION} to {PERSONAL}: use the same release of lbgm_compress at both ends"
            )
        if residual not in RESIDUALS or first not in PRECISIONS:
            raise ValueError(
                f"the request cannot be read: its residual is {residual!r}, and first {first!r}"
            )
        if round_ is not None and not (
            type(round_) is type(applied) is int and 0 <= applied < round_ < 2**63
        ):
            raise ValueError(
                f"the request cannot be read: its round is {round_!r}, after {applied!r}"
            )
        compressor = _built(expression, compressors)
        applied = 0 if round_ is None else applied
        down = None if downlink is None else _built(str(downlink), compressors)
        return Request(
            *(compressor, exclude, training, layout, digest, round_, applied),
            *(residual, down, first, personal),
        )


def with_request(content: RecordDict, request: bytes) -> RecordDict:
    """Return a copy of a message's content with a request in it."""
    configs = content.config_records
    if configs:
        # Mods of differential privacy need exactly one ConfigRecord.
        key, config = next(iter(configs.items()))
        return RecordDict({**content, key: ConfigRecord({**config, KEY: request})})
    key = ADDED
    while key in content:
        key += "."
    return RecordDict({**content, key: ConfigRecord({ADDED: request})})


def check_residual(residual: str, compressor: Compressor) -> None:
    """Raise `ValueError` if clients cannot keep the residual in that place."""
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be 'memory' or 'model', not {residual!r}")
    if residual == "model" and not (
        isinstance(compressor, ErrorFeedback) and compressor.decay == 1
    ):
        raise ValueError(
            f"residual='model' needs ErrorFeedback(...) with a decay of 1 around all of the "
            f"compressor, which is {compressor!r}"
        )


def check_expression(compressor: Compressor, compressors: Sequence[type]) -> None:
    """Check that a client can build a compressor from its expression.

    Parameters
    ----------
    compressor
        The compressor that the server asks for.
    compressors
        Further classes that server and client know.

    Raises
    ------
    TypeError, ValueError
        If `compressors` holds something that is not a class, or the expression does not give an
        equal compressor.
    """
    expression = repr(compressor)
    try:
        read = parse_compressor(expression, compressors)
    except ValueError as error:
        if names := _unknown_classes(expression, compressors):
            raise ValueError(
                f"clients do not know {names} of {expression}: pass compressors=[{names}] to "
                f"CompressedStrategy, and use CompressionMod(compressors=[{names}]) at the clients"
            ) from None
        raise ValueError(
            f"clients cannot build {expression}, since the repr of a compressor must be the "
            f"expression that builds it: {error}"
        ) from None
    if read != compressor:
        raise ValueError(
            f"clients would build another compressor: {expression}, the repr of the given one, "
            f"builds {read!r}, which is not equal to it; pass the compressor's own classes as "
            "compressors=[...] to CompressedStrategy and to the clients' CompressionMod"
        )


def _built(expression: str, compressors: Sequence[type]) -> Compressor:
    try:
        compressor: Compressor = parse_compressor(expression, compressors)
    except ValueError as error:
        if names := _unknown_classes(expression, compressors):
            raise ValueError(
                f"the server's compressor is {expression}, and this client does not know "
                f"{names}: use CompressionMod(compressors=[{names}])"
            ) from None
        raise ValueError(f"the server's compressor cannot be built: {error}") from None
    return compressor


def _unknown_classes(expression: str, compressors: Sequence[type]) -> str:
    """Return the names, comma-separated, that an expression calls and no client knows."""
    if len(expression) > LONGEST:
        return ""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    called = [
        node.func.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    known = {one.__name__ for one in (*BUILT_IN, *compressors)}
    return ", ".join(dict.fromkeys(name for name in called if name not in known))
