"""The client's end: a filter on the results of tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from lbgm_compress._util.units import human_bytes
from lbgm_compress.adapters.nvflare.job import PackageFilter
from lbgm_compress.adapters.nvflare.layout import Layout, checked_compressor, nbytes, split
from lbgm_compress.adapters.nvflare.messages import KEY, Request, Update
from lbgm_compress.compressor import Compressor
from lbgm_compress.decoded import Decoded
from lbgm_compress.endpoints import Sender

__all__ = ["CompressUpdates"]


class CompressUpdates(PackageFilter):
    """A client's output filter that compresses its updates, for `DecompressUpdates` at the server.

    The floating-point arrays of a DXO of kind WEIGHT_DIFF, of numpy or torch, are replaced by one
    array of bytes. All other values are sent as they are. Clients must send differences: a recipe
    does so with ``params_transfer_type=TransferType.DIFF``.

    Between rounds the filter keeps the state of a `lbgm_compress.Sender` in memory, and with error
    feedback what its last message carried. If that update did not go into the model, because the
    result was lost, late, refused or rejected by the aggregator, the next request of the server
    says so, and what it carried is added to the residual. The client trusts its server in this. The
    state lasts as long as the client's process. In the simulator with fewer threads than clients
    that is one turn: every update is then sent in full, and a residual is lost, with a warning.

    Parameters
    ----------
    compressor
        A compressor of `lbgm_compress`, or its expression as text. The job's configuration holds
        the text.
    exclude
        Patterns (`fnmatch.fnmatchcase`) for names of arrays to be sent as they are, for example
        ``["head.*"]``.

    Raises
    ------
    TypeError
        If `compressor` is neither, or makes no messages, as `SharedSubspace`; or if `exclude` is
        not a list of str.
    ValueError
        If the expression cannot be read; if the compressor does more to an average than an
        aggregator would (``SignSGD(vote=True)``); or if it is of a class of your own.

    Examples
    --------
    >>> from lbgm_compress import LBGM, TopK
    >>> CompressUpdates(LBGM(TopK(0.01))).compressor
    'LBGM(TopK(0.01))'
    """

    def __init__(self, compressor: Compressor | str, exclude: Sequence[str] = ()) -> None:
        super().__init__([DataKind.WEIGHT_DIFF, DataKind.WEIGHTS], None)
        if isinstance(exclude, str) or not all(isinstance(one, str) for one in exclude):
            raise TypeError(f"exclude is a list of patterns, such as ['head.*'], not {exclude!r}")
        self._compressor = checked_compressor(compressor)
        # NVFlare writes the attributes named like parameters into the job's configuration.
        self.compressor = repr(self._compressor)
        self.exclude = list(exclude)
        self._request: Request | None = None
        self._training: int | None = None
        self._sender = Sender(self._compressor)
        # The ticket and the content of the last message, kept for compressors with a residual.
        self._last: tuple[int, Mapping[str, Decoded]] | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take the server's request out of a task."""
        if event_type == EventType.BEFORE_TASK_DATA_FILTER:
            self._request = Request.take_from(fl_ctx.get_prop(FLContextKey.TASK_DATA))

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return the compressed update.

        Raises
        ------
        ValueError
            If the DXO holds whole weights, the server has not asked for compressed updates, or an
            array has another shape or dtype than before.
        """
        if dxo.data_kind == DataKind.WEIGHTS:
            raise ValueError(
                "CompressUpdates compresses differences, and this result holds whole weights: use "
                "params_transfer_type=TransferType.DIFF, and the filter for tasks=['train'] alone"
            )
        tensors, forms, rest = split(dxo.data, self.exclude)
        if not tensors:
            return None
        request, self._request = self._request, None
        if request is None:
            raise ValueError(
                "the task has no request of DecompressUpdates, or its result has two updates: use "
                "recipe.add_server_input_filter(DecompressUpdates()), a task whose data is the "
                "model, and one DXO of kind WEIGHT_DIFF"
            )
        self._prepare(request, fl_ctx)
        layout = Layout(self.compressor, forms)
        known = layout.identifier() == request.layout
        digest = request.digest if known else bytes(8 * len(forms))
        peer = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        message, decoded = self._sender.encode(tensors, peer)
        self._last = (request.ticket, decoded) if self._compressor.has_residual else None
        packed = Update(request.ticket, request.layout if known else layout, message).pack()
        sent, dense = packed.nbytes + nbytes(rest), nbytes(dxo.data)
        self.log_info(
            fl_ctx, f"compressed update: {human_bytes(sent)}, {sent / max(dense, 1):.2%} of dense"
        )
        return DXO(dxo.data_kind, {KEY: packed, **rest}, dxo.meta)

    def _prepare(self, request: Request, fl_ctx: FLContext) -> None:
        """Begin anew with another server, and take back what did not go into the model."""
        if self._training is None and request.layout:
            self.log_warning(
                fl_ctx,
                "this process has lost what the client's last one kept: the update is sent in "
                "full, without a residual (in the simulator, use as many threads as clients)",
            )
        if self._training != request.training:
            # Workers must not share their randomness.
            name = str(fl_ctx.get_identity_name()).encode()
            seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
            self._sender, self._last = Sender(self._compressor, seed=seed), None
            self._training = request.training
        if self._last is not None and self._last[0] != request.applied:
            self._sender.give_back({name: one.dense() for name, one in self._last[1].items()})
            self.log_info(fl_ctx, "the last update did not go into the model")
        self._last = None
