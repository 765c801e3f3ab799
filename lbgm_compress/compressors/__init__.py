"""The compressors, one algorithm a file, and the parser of their expressions."""
