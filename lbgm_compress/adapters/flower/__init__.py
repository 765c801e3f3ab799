"""Compression for Flower's message API: a mod for the clients, and a strategy around yours.

>>> from flwr.clientapp import ClientApp
>>> from flwr.serverapp.strategy import FedAvg
>>> from lbgm_compress import LBGM, TopK
>>> from lbgm_compress.adapters.flower import CompressedStrategy, compression_mod
>>> app = ClientApp(mods=[compression_mod])  # client_app.py
>>> strategy = CompressedStrategy(FedAvg(), LBGM(TopK(0.01)))  # server_app.py

A round has three steps:

1. The strategy adds a request to each train message: the compressor, and the digest of the state
   that the server holds of the client.
2. The client's app trains as without compression. The mod takes the update, the new parameters
   minus the received ones, compresses it with a `lbgm_compress.Sender`, and replies with one array
   of bytes.
3. The strategy decodes the array with the `lbgm_compress.Receiver` of that client, adds the
   parameters that it sent, and hands the inner strategy the dense reply that it would get without
   compression.

A client uses a look-back gradient only if the digest says that the server holds the same one.
Therefore a lost reply, a late client or a restart at either end costs one full update, and never
gives a wrong one. With error feedback, what a reply carried that did not go into the model comes
back into the client's residual with the next request.

With ``CompressedStrategy(..., downlink=LookBackSubspace(4, values="int4"))`` the model travels to
clients compressed too, in train and evaluate messages. The server compresses the difference between
the model and what its clients hold, the mod rebuilds the model before the app sees the message, and
a client that missed messages is sent those that it lacks, or the whole model.

Compressors of your own are named at both ends: ``CompressionMod(compressors=[RandomK])`` and
``CompressedStrategy(FedAvg(), RandomK(0.1), compressors=[RandomK])``.
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
