"""The models before zoology's own, beside those."""

from helpers import synthetic_rows as synthetic

from based_jax.pictures.configurations import configurations
from experiments.mqar_pareto.before_after import before_and_after, earlier_label
from experiments.mqar_pareto.sweeps import RATES


def window(size, accuracy, seconds, **changes):
    row = synthetic.row(
        [synthetic.CONV, ("window", {"num_heads": 1, "window": size})], 128, accuracy=accuracy, **changes
    )
    return row | {"seconds": seconds}


def grid(size, best, seconds, rates=RATES):
    """Return the first seed's runs at these rates, the best at the least one."""
    return [window(size, best - place / 10, seconds, lr=rate, seed=123) for place, rate in enumerate(rates)]


def test_a_window_is_found_under_the_tokens_that_it_had():
    assert earlier_label("D 128, w 65") == "D 128, w 64"
    assert earlier_label("D 64, N 16, head 2") == "D 64, N 16, head 2"


def test_first_seeds_of_whole_configurations_stand_beside_each_other():
    before = [*grid(64, 0.5, 30), window(64, 0.9, 7, seed=124), *grid(32, 0.3, 1), *grid(8, 0.2, 1)]
    after = [*grid(65, 0.6, 300), *grid(33, 0.4, 1000, RATES[:3]), *grid(17, 0.4, 1000)]
    assert before_and_after(configurations(before), configurations(after)).splitlines()[2:] == [
        "| Sliding window, D 128, w 65 | 0.500 | 0.600 | 120 | 1,200 |",
        "| all of them |  |  | 120 | 1,200 |",
    ]
