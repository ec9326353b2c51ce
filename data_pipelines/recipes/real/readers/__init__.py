"""Readers of unpacked packages: pictures with captions, and English text.

Each takes the folders of its packages and yields items in a fixed order. Readers neither fetch nor write anything.
"""
