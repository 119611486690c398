"""What train/pilot.py is made of: looking at images, the settings it tries, its verdict and report.

Imports all of train/ but the programs and train/loop.py.
"""
