"""The claim: what a client's reply says of the model that the client holds.

A claim is one value of type bytes in a ConfigRecord of its own: the name of the version (16 bytes)
and the sums of its checksum. A client that cannot rebuild the model of a message replies with an
error instead, whose reason starts with `OUT_OF_SYNC`.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from lbgm_compress.adapters.flower.checksum import CHECKSUM_SIZE
from lbgm_compress.adapters.flower.request import ADDED, KEY
from lbgm_compress.endpoints.downlink import VERSION_SIZE

__all__ = ["OUT_OF_SYNC", "add_claim", "take_claim"]

OUT_OF_SYNC = "compression_mod: out of sync: "
CLAIM_SIZE = VERSION_SIZE + CHECKSUM_SIZE


def add_claim(reply: Message, claim: bytes) -> None:
    """Add a claim to a reply that is no error."""
    if claim and not reply.has_error():
        reply.content[ADDED] = ConfigRecord({KEY: claim})


def take_claim(reply: Message) -> bytes | None:
    """Remove the claim from a reply and return it; None if there is none.

    A claim of another size comes back empty.
    """
    if reply.has_error() or ADDED not in reply.content.config_records:
        return None
    claim = reply.content.config_records[ADDED].get(KEY)
    reply.content = RecordDict({k: record for k, record in reply.content.items() if k != ADDED})
    return claim if isinstance(claim, bytes) and len(claim) == CLAIM_SIZE else b""
