"""The Triton kernels, and in launch.py what makes operators of them. Nothing else needs Triton.

Imports torch and triton alone.
"""
