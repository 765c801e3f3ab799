"""The wire format: framing of messages, packing of bits, coding of indices and values.

Every multi-byte number is little-endian. The formats are documented in these places:

- :mod:`lbgm_compress.wire.message`: a message, and the first byte of every payload in it;
- :mod:`lbgm_compress.wire.indices`: the positions of a sparse tensor;
- :mod:`lbgm_compress.wire.values`: floating-point values in a chosen precision;
- the docstring of each compressor: the body of its payload.
"""
