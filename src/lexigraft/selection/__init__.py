"""What decides which tokens are worth having: word lists, terms, contrast, how many.

Plain functions over texts and numbers; whatever only a tokenizer knows comes in as an argument.
"""
