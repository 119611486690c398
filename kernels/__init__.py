"""Operations of the training step: each file holds a plain twin and, where one exists, its kernel.

A newcomer's mistake: a plain twin is the specification, not a fallback to be tuned; the CPU
path runs it and every kernel is tested against it.
"""
