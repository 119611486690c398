"""A run and what belongs to it: images, optimizer, state, folder, checkpoints, metrics, report.

state.py is what a checkpoint holds. Imports distributed/, config/, methods/ and network/.
"""
