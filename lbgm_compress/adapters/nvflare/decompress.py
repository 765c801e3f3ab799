"""The server's end: a filter on the results of clients."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from torch import Tensor

from lbgm_compress._util.units import human_bytes
from lbgm_compress.adapters.nvflare.job import PackageFilter
from lbgm_compress.adapters.nvflare.layout import Layout, checked_compressor, nbytes, shape_of
from lbgm_compress.adapters.nvflare.messages import KEY, Request, Update
from lbgm_compress.endpoints import Receiver
from lbgm_compress.wire.errors import OutOfSyncError, PayloadError

__all__ = ["DecompressUpdates"]

TICKET = "lbgm_compress.ticket"


@dataclass
class _Client:
    """What the server holds of one client."""

    ticket: int = 0
    """The ticket of the task that it is to answer; 0 for none."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of the model's arrays in that task."""
    layout: Layout | None = None
    identifier: bytes = b""
    """The hash of the layout."""
    receiver: Receiver | None = None
    applied: int = 0
    """The ticket of its last update that went into the model; 0 for none."""
    decoded: int = 0
    """The ticket of its last update that was decoded, as long as `applied` is not settled."""
    accepted: bool | None = None
    """The controller's verdict on that update; None if there was none."""


class DecompressUpdates(PackageFilter):
    """A server's input filter that restores the updates of clients with `CompressUpdates`.

    Aggregators see the update that would have come without compression: the same names, shapes and
    dtypes, in arrays of numpy or torch as at the client. A client without `CompressUpdates` may
    take part; its updates pass as they are.

    Updates are not trusted. Whose an update is comes from the peer's identity in NVFlare's context.
    An update is refused if it is malformed, does not answer the client's last task, has an array
    that is not in the model of that task or has another shape there, or has inf or nan in a
    compressed array. A refused update is logged as an error and replaced by one without arrays,
    which NVFlare's aggregators skip, so that the round goes on. Nothing changes for other clients.

    What the server holds of each client, compressed as it came, is in memory for the run. The meta
    data of each restored DXO get an entry ``"lbgm_compress"``, a dict with ``uplink_bytes`` and
    ``dense_bytes``.

    Examples
    --------
    >>> DecompressUpdates().stats()
    {'updates': 0, 'refused': 0, 'uplink_bytes': 0, 'dense_bytes': 0, 'ratio': 0.0}
    """

    def __init__(self) -> None:
        super().__init__([DataKind.WEIGHT_DIFF], None)
        self._training = secrets.randbits(63) or 1
        self._clients: dict[str, _Client] = {}
        self._plain: set[str] = set()
        # True once the controller was seen to say which contributions it accepts.
        self._verdicts = False
        self._counts = {"updates": 0, "refused": 0, "uplink_bytes": 0, "dense_bytes": 0}
        # Tasks are asked for on threads of their own.
        self._lock = threading.RLock()

    def stats(self) -> dict[str, int | float]:
        """Return counts and sizes of the compressed updates so far.

        Returns
        -------
        dict
            ``updates`` that were restored, ``refused`` ones; ``uplink_bytes``, what the restored
            ones took, with the arrays sent as they are; ``dense_bytes``, what they would have taken
            without compression; and ``ratio``, the quotient of the two.
        """
        with self._lock:
            sent, dense = self._counts["uplink_bytes"], self._counts["dense_bytes"]
            return {**self._counts, "ratio": sent / dense if dense else 0.0}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Add requests to tasks, and see which updates the controller accepts."""
        with self._lock:
            if event_type == EventType.AFTER_TASK_DATA_FILTER:
                self._ask(fl_ctx)
            elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT:
                self._see_verdict(fl_ctx)
            elif event_type == EventType.END_RUN and self._counts["updates"]:
                stats = self.stats()
                self.log_info(
                    fl_ctx,
                    f"compressed updates: {stats['updates']}, refused {stats['refused']}; "
                    f"{human_bytes(stats['uplink_bytes'])}, {stats['ratio']:.2%} of dense",
                )

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return the restored update; one without arrays in the place of a refused one."""
        with self._lock:
            name = _peer(fl_ctx)
            if KEY not in dxo.data:
                if name not in self._plain:
                    self._plain.add(name)
                    self.log_warning(fl_ctx, f"the updates of {name} come uncompressed")
                return None
            try:
                _check_identity(name, shareable)
                data, ticket = self._restored(name, dxo.data)
            except PayloadError as error:
                self._counts["refused"] += 1
                self.log_error(fl_ctx, f"the update of {name} is refused: {error}")
                return DXO(dxo.data_kind, {}, dxo.meta)
            fl_ctx.set_prop(TICKET, ticket, private=True, sticky=False)
            sent, dense = nbytes(dxo.data), nbytes(data)
            self._counts["updates"] += 1
            self._counts["uplink_bytes"] += sent
            self._counts["dense_bytes"] += dense
            self.log_info(
                fl_ctx,
                f"update of {name}: {human_bytes(sent)}, {sent / max(dense, 1):.2%} of dense",
            )
            restored = DXO(dxo.data_kind, data, dxo.meta)
            restored.set_meta_prop(KEY, {"uplink_bytes": sent, "dense_bytes": dense})
            return restored

    # --- tasks ------------------------------------------------------------------------------------

    def _ask(self, fl_ctx: FLContext) -> None:
        """Add the request to the task of a client, if its data is a model."""
        task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        try:
            dxo = from_shareable(task)
        except (ValueError, AttributeError):
            return
        if dxo.data_kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
            return
        client = self._clients.setdefault(_peer(fl_ctx), _Client())
        if client.decoded:
            # A controller that gives verdicts has dropped a result for which there is none.
            accepted = not self._verdicts if client.accepted is None else client.accepted
            if accepted:
                client.applied = client.decoded
            client.decoded, client.accepted = 0, None
        client.ticket = secrets.randbits(63) or 1
        shapes = ((name, shape_of(value)) for name, value in dxo.data.items())
        client.shapes = {name: shape for name, shape in shapes if shape is not None}
        digest = b""
        if client.receiver is not None:
            digest = client.receiver.digest(0).numpy().tobytes()
        request = Request(self._training, client.ticket, client.applied, client.identifier, digest)
        request.add_to(task)

    def _see_verdict(self, fl_ctx: FLContext) -> None:
        self._verdicts = True
        client = self._clients.get(_peer(fl_ctx))
        ticket = fl_ctx.get_prop(TICKET)
        if client is not None and ticket and client.decoded == ticket:
            client.accepted = bool(fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED))

    # --- results ----------------------------------------------------------------------------------

    def _restored(self, name: str, data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the values of an update and its ticket, and keep the state that it sets."""
        update = Update.unpack(data[KEY])
        client = self._clients.get(name)
        if client is None or not client.ticket or update.ticket != client.ticket:
            raise PayloadError("it does not answer the last task of the client, or comes twice")
        # A task is answered once.
        client.ticket = 0
        layout, receiver = self._layout_of(client, update)
        for form in layout.forms:
            if client.shapes.get(form.name) != form.shape:
                raise PayloadError(
                    f"its array {form.name!r} has shape {form.shape}, and the model of the task "
                    f"has {client.shapes.get(form.name, 'none of this name')}"
                )
            if form.name in data:
                raise PayloadError(f"its array {form.name!r} is there twice")
        if receiver is None:
            receiver = Receiver(_parsed(layout.compressor), layout.likes())
        try:
            tensors = receiver.decompress(0, update.message, check=_check_finite)
        except OutOfSyncError:
            receiver.drop(0)
            raise
        client.layout, client.identifier = layout, layout.identifier()
        client.receiver = receiver
        client.decoded, client.accepted = update.ticket, None
        rest = {key: value for key, value in data.items() if key != KEY}
        return {
            **{form.name: form.restored(tensors[form.name]) for form in layout.forms},
            **rest,
        }, (update.ticket)

    def _layout_of(self, client: _Client, update: Update) -> tuple[Layout, Receiver | None]:
        """Return the layout of an update, and the receiver that is held for it, if any."""
        if isinstance(update.layout, Layout):
            return update.layout, None
        if client.layout is None or update.layout != client.identifier:
            raise PayloadError("it has another layout than the server knows of the client")
        return client.layout, client.receiver


def _peer(fl_ctx: FLContext) -> str:
    """Return the name of the client, as NVFlare knows it."""
    peer = fl_ctx.get_peer_context()
    return str(peer.get_identity_name()) if peer is not None else ""


def _check_identity(name: str, shareable: Shareable) -> None:
    """Check the name against the client that NVFlare's server has authenticated."""
    client = shareable.get_header(ServerCommandKey.FL_CLIENT)
    if client is not None and getattr(client, "name", client) != name:
        raise PayloadError("its sender is not the one that was authenticated")


def _parsed(expression: str) -> Any:
    try:
        return checked_compressor(expression)
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"its compressor cannot be built: {error}") from None


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PayloadError(f"it makes elements of {name!r} inf or nan")
