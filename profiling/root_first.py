"""Importing this puts the repo root first on sys.path and profiling/, which is no package, last.

The first import of every program here: else profiling/kernels.py is imported as kernels/.
"""

import os
import sys

FOLDER = os.path.dirname(__file__)
if sys.path[0] == FOLDER:  # a program of this folder was started
    sys.path[0] = os.path.dirname(FOLDER)
    sys.path.append(FOLDER)
