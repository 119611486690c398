"""Stands in for missing machines: hosts made of network namespaces, an H200.

Imports nothing else of the project.
"""
