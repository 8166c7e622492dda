"""What the suite tells JAX by the environment: programs compile fast, and run slowly."""

import os

# Most of the time goes into compiling for the CPU: XLA's older emitters are four times as quick at it as its new ones.
XLA_FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
# Pallas' GPU interpreter blocks a thread for each warpgroup that waits: two, on two cores, would leave none to compile.
OTHERS = {"PJRT_NPROC": "16", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def of_the_suite() -> dict[str, str]:
    """Return this environment with them, beside what whoever runs the suite has set."""
    return OTHERS | {**os.environ, "XLA_FLAGS": f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"}


def of_a_user() -> dict[str, str]:
    """Return this environment without them."""
    told = {name: value for name, value in os.environ.items() if name not in OTHERS}
    return told | {"XLA_FLAGS": told["XLA_FLAGS"].replace(XLA_FLAGS, "").strip()}
