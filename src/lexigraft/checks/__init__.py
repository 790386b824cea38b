"""What `check` knows: one module per subject, each a function from facts to findings.

Facts come from headers and small files alone; no weights are read and torch is not imported.
"""
