"""The server's end of the uplink: decodes the replies of a round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, RecordDict
from torch import Tensor

from lbgm_compress.adapters.flower.client_states import ClientStates
from lbgm_compress.adapters.flower.personal import placed
from lbgm_compress.adapters.flower.reply import NDArray, Part, Reply, compressible, tensor_of
from lbgm_compress.adapters.flower.request import KEY
from lbgm_compress.adapters.flower.round import Asked, Received, Round
from lbgm_compress.adapters.flower.screening import majority
from lbgm_compress.adapters.flower.statistics import Statistics
from lbgm_compress.wire.errors import PayloadError

__all__ = ["Uplink"]

Dtypes = tuple[tuple[str, str], ...]


class Uplink:
    """Turns compressed replies into the dense ones that clients would send without compression.

    Parameters
    ----------
    states
        The states that the clients' messages look back at.
    """

    def __init__(self, states: ClientStates) -> None:
        self.states = states
        # The dtypes of most replies of the last round, which decide where as many replies differ.
        self._dtypes: Dtypes | None = None

    def decode(self, round_: Round, replies: Sequence[Received]) -> Statistics:
        """Decode the accepted replies of a round, in place.

        Arrays come in the dtypes that most replies have. A reply that cannot be decoded, or brings
        inf or nan where the server's own parameter is finite, is rejected.

        Returns
        -------
        Statistics
            Statistics of all replies.
        """
        statistics = Statistics(replies=len(replies))
        unpacked = self._unpack(round_, replies)
        dtypes = self._choose_dtypes(round_, unpacked)
        for received, asked, reply in unpacked:
            try:
                self._decode(round_, asked, received, reply, dtypes, statistics)
            except PayloadError as error:
                received.rejection = str(error)
        statistics.failed = sum(received.message.has_error() for received in replies)
        statistics.rejected = sum(received.rejection is not None for received in replies)
        return statistics

    def _unpack(
        self, round_: Round, replies: Sequence[Received]
    ) -> list[tuple[Received, Asked, Reply]]:
        """Take accepted replies apart, and reject those that are malformed."""
        answers = Counter(
            id(received.asked) for received in replies if not received.message.has_error()
        )
        unpacked = []
        for received in replies:
            if not received.accepted:
                continue
            asked = received.asked
            try:
                if asked is None or answers[id(asked)] > 1:
                    raise PayloadError("it is not the one answer to a message of this round")
                sent = round_.sent(asked.record)
                reply = Reply.unpack(_array(received, asked), sent.parts, sent.excluded)
            except PayloadError as error:
                received.rejection = str(error)
            else:
                unpacked.append((received, asked, reply))
        return unpacked

    def _choose_dtypes(
        self, round_: Round, unpacked: Sequence[tuple[Received, Asked, Reply]]
    ) -> dict[str, str]:
        """Return the dtype of each array in most replies."""
        if not unpacked:
            return {}
        _, asked, _ = unpacked[-1]
        unchanged = _dtypes(round_.sent(asked.record).parts)
        found = (_dtypes(reply.parts) for _, _, reply in unpacked)
        self._dtypes = majority(found, [self._dtypes, unchanged])
        assert self._dtypes is not None
        return dict(self._dtypes)

    def _decode(
        self,
        round_: Round,
        asked: Asked,
        received: Received,
        reply: Reply,
        dtypes: Mapping[str, str],
        statistics: Statistics,
    ) -> None:
        """Replace the content of a reply by dense arrays, and keep the client's new state."""
        sent = round_.sent(asked.record)
        parts = reply.parts
        new: dict[str, NDArray] = {}
        recycled = 0

        def add(name: str, array: NDArray) -> None:
            _check_finite(name, array, sent.arrays[name])
            with np.errstate(over="ignore", invalid="ignore"):
                new[name] = array.astype(dtypes.get(name, array.dtype), copy=False)
            _check_finite(name, new[name], sent.arrays[name])

        for name, array in reply.exact.items():
            add(name, array)
        if reply.message is not None:

            def check(changes: Mapping[str, Tensor]) -> None:
                for name, change in changes.items():
                    add(name, (tensor_of(sent.arrays[name], parts[name].dtype) + change).numpy())

            report = self.states.decode(
                asked.message.metadata.dst_node_id,
                compressible(parts, sent.excluded),
                reply.message,
                [name for name, part in parts.items() if not part.exact],
                check,
            )
            recycled = sum(tensor.recycled for tensor in report.values())
        statistics.uplink += len(_array(received, asked).data)
        statistics.dense += sum(part.nbytes for part in parts.values())
        statistics.recycled += recycled
        statistics.tensors += len(parts) - len(reply.exact)
        others = {name: Array(np.asarray(new[name])) for name in sent.arrays}
        arrays = placed(others, sent.personal)
        content = received.message.content
        rest = {name: one for name, one in content.items() if name not in content.array_records}
        received.message.content = RecordDict({asked.key: arrays, **rest})


def _dtypes(parts: Mapping[str, Part]) -> Dtypes:
    return tuple((name, part.dtype) for name, part in parts.items())


def _array(received: Received, asked: Asked) -> Array:
    """Return the array of a compressed reply."""
    records = received.message.content.array_records
    if len(records) != 1:
        raise PayloadError(f"it has {len(records)} ArrayRecords, expected one")
    [(key, record)] = records.items()
    if list(record) != [KEY]:
        raise PayloadError(
            "it is not compressed: put compression_mod first into ClientApp(mods=[...])"
        )
    if key != asked.key and asked.key in received.message.content:
        raise PayloadError(f"another record has the name of its arrays, {asked.key!r}")
    return record[KEY]


def _check_finite(name: str, array: NDArray, sent: NDArray) -> None:
    """Raise if an array has inf or nan where the server's own parameter is finite.

    Elements that would overflow in the server's dtype count as inf.
    """
    if array.dtype.kind not in "fc":
        return
    finite = np.isfinite(array)
    if sent.dtype.kind in "fc" and sent.dtype.itemsize < array.dtype.itemsize:
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(array.astype(sent.dtype))
    if not finite.all() and (~finite & np.isfinite(sent)).any():
        raise PayloadError(f"it makes elements of {name!r} inf or nan")
