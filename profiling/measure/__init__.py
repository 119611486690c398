"""What measures: loader, step, kernels, their peers; its flags, clock, tables and result files.

Imports stand_ins/ of profiling/, and train/, kernels/ and pipeline/.
"""
