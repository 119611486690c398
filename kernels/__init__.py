"""Operations of the training step: each with a plain twin and, on a GPU, kernels of gpu/.

The plain twin is the specification: the CPU runs it and every kernel is tested against it. Imports
nothing of pipeline/ or train/.
"""
