"""What `check` knows: one module per subject, each a function from facts to findings.

Facts come from headers and small files alone. Weights are read by `deep` only, in blocks; torch is
never imported.
"""
