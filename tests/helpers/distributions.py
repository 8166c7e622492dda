"""Distributions and constants that a model's initial values follow, by what tables call them, and whether values do."""

import math

import numpy as np
from scipy import stats

D, DEPTH = 64, 3
"""Of the model."""
PLACES = (np.arange(20000) + 0.5) / 20000
NORMAL, UNIFORM = stats.norm.ppf(PLACES), 2 * PLACES - 1
STEPS = np.exp(math.log(1e-3) + PLACES * math.log(100))
RANDOM = {
    "N(0, 0.02)": lambda shape: 0.02 * NORMAL,
    "N(0, 0.02/sqrt(2L))": lambda shape: 0.02 / math.sqrt(2 * DEPTH) * NORMAL,
    "N(0, 1/sqrt(head))": lambda shape: NORMAL / math.sqrt(shape[1]),
    "N(0, 1)": lambda shape: NORMAL,
    "N(0, sqrt(1/2))": lambda shape: math.sqrt(0.5) * NORMAL,
    "U(1/sqrt(3))": lambda shape: UNIFORM / math.sqrt(3),
    "U(1/sqrt(4))": lambda shape: UNIFORM / math.sqrt(4),
    "U(1/sqrt(N))": lambda shape: UNIFORM / math.sqrt(shape[-1]),
    "U(1/sqrt(D))": lambda shape: UNIFORM / math.sqrt(D),
    "U(1/sqrt(fan_in))": lambda shape: UNIFORM / math.sqrt(shape[0]),
    "U(1/sqrt(L fan_in))": lambda shape: UNIFORM / math.sqrt(DEPTH * shape[0]),
    "U(log 0.001, log 0.1)": lambda shape: np.log(STEPS),
    "log U(0, 16)": lambda shape: np.log(16 * PLACES),
    "log U(1, 16)": lambda shape: np.log(1 + 15 * PLACES),
    "softplus^-1 of exp U(log 0.001, log 0.1)": lambda shape: STEPS + np.log(-np.expm1(-STEPS)),
}
"""By distribution: its quantiles at `PLACES`, which may depend on the parameter's shape."""


def powers(*exponents):
    return lambda shape: np.stack([(np.arange(shape[-1]) / shape[-1]) ** x for x in exponents])


def along(values):
    """Return values of the places 0 to 1, and the indices, of all channels."""
    return lambda shape: values(np.linspace(0, 1, math.prod(shape)), np.arange(math.prod(shape))).reshape(shape)


def time_features(shape):
    angles = 1e-4 * 2 * np.pi * np.arange(shape[0]) / shape[0]
    return np.stack([np.linspace(0, 1, shape[0]), np.cos(angles), -np.sin(angles)], axis=1)


CONSTANT = {
    "-2": lambda shape: np.full(1, -2.0),
    "0": lambda shape: np.zeros(1),
    "1": lambda shape: np.ones(1),
    "log 0.5": lambda shape: np.full(1, math.log(0.5)),
    "e_1 of N": lambda shape: np.eye(shape[-1])[0],
    "(1, 0)": lambda shape: np.eye(2)[0],
    "pi (0 .. N/2)": lambda shape: np.pi * np.arange(shape[-1]),
    "log (1 .. N)": lambda shape: np.log(1 + np.arange(shape[-1])),
    "time": time_features,
    "(i/D)^(1, 1)": powers(1, 1),
    "(i/D)^(1, 1, 1/2)": powers(1, 1, 0.5),
    "(i/D)^(1/2, 1, 1, 1/2)": powers(0.5, 1, 1, 0.5),
    "1 - i/D": lambda shape: 1 - powers(1)(shape),
    "-5 + 8 r^0.7": along(lambda r, i: -5 + 8 * r**0.7),
    "-6 + 5 r^0.7": along(lambda r, i: -6 + 5 * r**0.7),
    "0.1 zigzag": along(lambda r, i: 0.1 * ((i + 1) % 3 - 1)),
    "log 0.3 + 0.5 zigzag": along(lambda r, i: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)),
}
"""By name: the values themselves, broadcast to the parameter's shape."""


def follows(values, distribution):
    """Return whether values (seeds, ...) are those of a constant, or have a distribution's mean and deviation.

    Five deviations of either, of as many draws as there are values.
    """
    shape = values.shape[1:]
    if distribution in CONSTANT:
        return np.allclose(values, np.broadcast_to(CONSTANT[distribution](shape), values.shape), atol=1e-6)
    expected = RANDOM[distribution](shape)
    mean, deviation = expected.mean(), expected.std()
    kurtosis = np.mean((expected - mean) ** 4) / deviation**4
    close_mean = abs(values.mean() - mean) < 5 * deviation / math.sqrt(values.size)
    return close_mean and abs(values.std() / deviation - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * values.size))
