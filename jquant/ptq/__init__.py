"""Post-training quantization: one method a file."""
