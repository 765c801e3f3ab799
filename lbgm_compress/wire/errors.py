"""Errors that a receiver raises for bytes that it cannot decode."""

__all__ = ["OutOfSyncError", "PayloadError"]


class PayloadError(ValueError):
    """Raised if bytes are not a message or payload that this receiver can decode.

    The receiver's state is unchanged.
    """


class OutOfSyncError(PayloadError):
    """Raised if a message recycles a look-back gradient that the receiver does not hold.

    The receiver's state is unchanged. The sender must send in full: by ``sender.reset()``, or by
    ``sender.compress(grads, peer=receiver.digest(sender_id))``.
    """
