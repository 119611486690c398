"""Studies: the table of variants, the runs of a study, and its report.

train/study.py is the program. Imports run/ and the folders below it.
"""
