"""LBGM for Flower's message API: a mod at the clients, a strategy around yours at the server.

>>> from flwr.clientapp import ClientApp
>>> from flwr.serverapp.strategy import FedAvg
>>> from lbgm_compress import LBGM, TopK
>>> from lbgm_compress.adapters.flower import CompressedStrategy, compression_mod
>>> app = ClientApp(mods=[compression_mod])  # client_app.py
>>> strategy = CompressedStrategy(FedAvg(), LBGM(TopK(0.01)))  # server_app.py

A round: the strategy adds to each train message the compressor and the digest of what it holds of
that client. The client's app trains as ever; the mod takes the update, new parameters minus
received ones, compresses it with a `lbgm_compress.Sender`, and replies one array of bytes. The
strategy decodes it with the `lbgm_compress.Receiver` of that client, adds the received parameters,
and hands the inner strategy the dense reply that it would have had.

What a client looks back at is used only where the digest says that the server holds the same, so
that lost replies, late clients and restarts at either end cost one full update, never a wrong one.
"""

try:
    from lbgm_compress.adapters.flower.mod import CompressionMod, compression_mod
    from lbgm_compress.adapters.flower.plots import plot
    from lbgm_compress.adapters.flower.strategy import CompressedStrategy
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("flwr", "safetensors"):
        raise
    raise ImportError(
        "lbgm_compress.adapters.flower needs Flower (1.39 to 1.41) and safetensors: "
        "pip install 'lbgm_compress[flower]', with Python 3.11 or newer"
    ) from error

__all__ = ["CompressedStrategy", "CompressionMod", "compression_mod", "plot"]
