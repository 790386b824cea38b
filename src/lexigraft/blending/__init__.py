"""Whole models of one architecture blended into one, vocabularies aligned by token text.

`methods` holds the formulas over blocks of rows, `settings` what is asked for (options or a
mergekit recipe), `inputs` the models, opened and aligned, `streams` the passes over each tensor.
"""
