"""Files to named arrays and back: GGUF, safetensors, tokenizers, native checkpoints."""
