"""NNX modules that hold quantized weights, and surgery that puts them into a model by path."""
