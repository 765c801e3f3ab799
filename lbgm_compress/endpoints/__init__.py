"""The two ends of a connection, which alone hold state between rounds."""

from lbgm_compress.endpoints.downlink import Publisher, Subscriber
from lbgm_compress.endpoints.receiver import Receiver
from lbgm_compress.endpoints.sender import Sender
from lbgm_compress.endpoints.tensors import TensorReport

__all__ = ["Publisher", "Receiver", "Sender", "Subscriber", "TensorReport"]
