"""The real engines of `benchmarks/compare.py`: DDP, Horovod and Flower."""
