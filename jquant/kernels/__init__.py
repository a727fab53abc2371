"""The same maths, fused for one device: Pallas kernels beside their jnp references; dispatch.py says what runs."""
