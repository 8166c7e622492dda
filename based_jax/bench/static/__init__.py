"""What kernels for TPUs cost as libtpu schedules them, beside XLA's forms: no TPU is there, and nothing is timed.

`calls` says what is compiled, `points` for which chips, and what a row says of it; `schedules` reads what libtpu wrote.
"""
