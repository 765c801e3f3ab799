"""Filters for NVFlare that compress what clients send to the server.

>>> from lbgm_compress.adapters.nvflare import CompressUpdates, DecompressUpdates
>>> def compressed(recipe):
...     recipe.add_client_output_filter(
...         CompressUpdates("ErrorFeedback(LookBackSubspace(4, values='int4'))"), tasks=["train"]
...     )
...     recipe.add_server_input_filter(DecompressUpdates(), tasks=["train"])

A round has three steps:

1. The server's filter adds a request to the task of each client: a ticket, the digest of what it
   holds of the client, and the ticket of the client's last update that went into the model.
2. The client's filter replaces the floating-point arrays of the update (a DXO of kind WEIGHT_DIFF)
   by one array of bytes, the message of a `lbgm_compress.Sender`.
3. The server's filter decodes it with the `lbgm_compress.Receiver` of that client, and hands on the
   update that would have come without compression, in the same arrays of numpy or torch.

A client looks back only at what the digest says that the server holds. Therefore a lost result, a
task that is sent again or a restart at either end costs one full update, and never gives a wrong
one.
"""

try:
    from lbgm_compress.adapters.nvflare.compress import CompressUpdates
    from lbgm_compress.adapters.nvflare.decompress import DecompressUpdates
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "nvflare":
        raise
    raise ImportError(
        "lbgm_compress.adapters.nvflare needs NVFlare 2.9: pip install 'lbgm_compress[nvflare]'"
    ) from error

__all__ = ["CompressUpdates", "DecompressUpdates"]
