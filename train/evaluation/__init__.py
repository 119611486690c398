"""How good an encoder is: features, kNN, RankMe, linear probes, pictures.

embed.py computes the features for all others; feature_*.py those of any images, for
train/features.py. Imports run/ and the folders below it.
"""
