"""The models before zoology's own, beside those."""

from helpers import synthetic_rows as synthetic

from based_jax.pictures.configurations import configurations
from experiments.mqar_pareto.before_after import before_and_after, earlier_label


def window(size, accuracy, seconds, **changes):
    row = synthetic.row(
        [synthetic.CONV, ("window", {"num_heads": 1, "window": size})], 128, accuracy=accuracy, **changes
    )
    return row | {"seconds": seconds}


def test_a_window_is_found_under_the_tokens_that_it_had():
    assert earlier_label("D 128, w 65") == "D 128, w 64"
    assert earlier_label("D 64, N 16, head 2") == "D 64, N 16, head 2"


def test_first_seeds_stand_beside_each_other_and_their_seconds_are_added():
    before = [window(64, 0.5, 30, seed=123), window(64, 0.4, 20, lr=1e-2, seed=123), window(64, 0.9, 7, seed=124)]
    after = [window(65, 0.6, 10, seed=123), window(33, 0.3, 1000, seed=123)]
    assert before_and_after(configurations(before), configurations(after)).splitlines()[2:] == [
        "| Sliding window, D 128, w 65 | 0.500 | 0.600 | 50 | 10 |",
        "| Sliding window, D 128, w 33 | - | 0.300 | - | 1,000 |",
        "| all of them |  |  | 50 | 1,010 |",
    ]
