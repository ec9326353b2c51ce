"""Readers of unpacked packages: pictures with captions, and English text.

Each takes the folders of its packages and yields in a fixed order. Nothing here fetches or writes.
"""
