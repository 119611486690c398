"""How good an encoder is: features, kNN, linear probe, spread, pictures.

embed.py makes the features that all others take. Imports run/ and the folders below it.
"""
