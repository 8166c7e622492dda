"""One small module per command of `python -m based_jax`; each has `add_arguments(parser)` and `run(args)`.

A `run` imports what it needs itself: jax, pandas and matplotlib take seconds to import, and `--help` and what is wrong
with the arguments should be there at once.
"""
