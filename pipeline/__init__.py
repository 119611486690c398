"""From the bytes of images to two augmented channels-last views of each, by DALI.

loader.py is the entry. Imports its sources/ and nothing of kernels/ or train/.
"""
