"""Measurements against other tools and methods: python benchmarks/NAME.py --help.

common.py holds what they share.
"""
