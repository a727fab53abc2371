"""Pure functions on arrays: element formats, schemes, QTensor, packing, gradients, error metrics."""
