"""NNX modules: layers, mixers, blocks and the language model."""
