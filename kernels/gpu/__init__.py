"""The Triton kernels, and launch.py, which makes them torch operators and needs no Triton itself.

Imports torch and triton alone.
"""
