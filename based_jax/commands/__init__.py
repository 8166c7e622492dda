"""One small module per command of `python -m based_jax`; each has `add_arguments(parser)` and `run(args)`."""
