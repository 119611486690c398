"""What is computed and not measured: the roofline, memory, the cost of a network of GPUs.

Imports measure/ of profiling/, for the bandwidth that a roofline takes, train/ and pipeline/.
"""
