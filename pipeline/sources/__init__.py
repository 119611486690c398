"""Where images come from: folders, tar, TFRecord and RecordIO shards, the embedded digits.

From a sample's number to its encoded bytes and its size. Imports nothing else of pipeline/.
"""
