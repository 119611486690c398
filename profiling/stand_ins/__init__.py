"""What stands in for machines that are not there: hosts made of network namespaces, an H200.

Imports nothing else of the project.
"""
