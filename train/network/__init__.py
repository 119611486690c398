"""The network: ResNet, heads, batch norm per view and over ranks, and in which precision it runs.

ModelConfig holds its flags. Imports kernels/ alone.
"""
