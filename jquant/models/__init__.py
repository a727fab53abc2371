"""One NNX decoder for the Llama family of language models, and what loads and runs it."""
