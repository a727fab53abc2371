"""One NNX decoder for all families of language models, and what loads and runs it."""
