"""What engines whose ranks exchange messages share: transports, averaging, a background thread."""
