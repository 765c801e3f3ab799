"""Engines that move the messages of `benchmarks/compare.py`: one process, DDP, Horovod, Flower."""
