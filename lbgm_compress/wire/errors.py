"""What a receiver raises when bytes cannot be decoded."""

__all__ = ["OutOfSyncError", "PayloadError"]


class PayloadError(ValueError):
    """The bytes are not a message or payload that this receiver can decode.

    The receiver's state is as it was before the call.
    """


class OutOfSyncError(PayloadError):
    """The message recycles a look-back gradient that the receiver does not hold.

    The receiver's state is as it was before the call. The sender heals it by sending in full:
    ``sender.reset()``, or ``sender.compress(grads, peer=receiver.digest(sender_id))``.
    """
