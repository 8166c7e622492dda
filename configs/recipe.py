"""The recipe that all families share: that of the released Based models, for 10, 30 or 50 billion tokens.

A family's file has its models by size, and returns `config(MODELS, variant)`. A variant is a size and the tokens,
360m_30b; a size alone means 10b. All values follow an override of what they are made from: --config.steps=1000 warms
up for 10. Source: HazyResearch/based:train/configs/experiment/reference.
"""

from ml_collections import ConfigDict

STEPS_BY_TOKENS = {"10b": 20_000, "30b": 60_000, "50b": 100_000}


def variants(models):
    """Return the names of a family's variants: 360m, 360m_10b, 360m_30b, 360m_50b, and so on for each size."""
    return tuple(name for size in models for name in (size, *(f"{size}_{tokens}" for tokens in STEPS_BY_TOKENS)))


def config(models, variant):
    """Return the config that trains the variant's model, a section `model` from `models` by size."""
    size, _, tokens = variant.partition("_")
    run = ConfigDict(
        {
            "model": {"scan_layers": True, **models[size]},
            "data": {"kind": "text"},
            "optim": {},
            "steps": STEPS_BY_TOKENS[tokens or "10b"],
            "batch_size": 256,
            "microbatches": 32,
        }
    )
    run.optim.warmup_steps = run.get_ref("steps") // 100
    return run
