"""Models in memory: load, packing, bits per byte, new rows as parameters, training.

The only package that imports transformers models.
"""
