"""Paged attention on CUDA: the kernels' source, its build, and its binding behind `kernels.Kernels`.

The same source runs on a CPU, compiled over `emulation/`: that is how it is tested where there is no GPU.
"""
