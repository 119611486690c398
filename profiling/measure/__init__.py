"""What measures: loader, step, kernels, their peers; its flags, clock, tables and result files.

Imports nothing else of profiling/; train/, kernels/ and pipeline/.
"""
