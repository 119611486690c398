"""Operations of the training step: in plain PyTorch, and on a GPU by the kernels of gpu/.

The CPU runs the plain version, which every kernel is tested against. Imports nothing of pipeline/
or train/.
"""
