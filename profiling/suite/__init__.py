"""The parts of gpu_suite.py: its stages, what each checks, and those that run only when named.

Imports measure/ and predict/ of profiling/, and train/.
"""
