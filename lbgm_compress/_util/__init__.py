"""Helpers: units, files, arguments, batches of tensors, and names and states of both ends."""
