"""Based and the sequence mixers it is compared with, in JAX."""
