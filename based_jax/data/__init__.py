"""Training and evaluation data as numpy arrays: batch t is a pure function of (config, t), split by host."""
