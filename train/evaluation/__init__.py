"""How good an encoder is: features, kNN, RankMe, linear probes, pictures.

embed.py computes the features for all others. Imports run/ and the folders below it.
"""
