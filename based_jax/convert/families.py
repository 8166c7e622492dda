"""Which published models there are: told apart when they are read, named when they are written."""

from based_jax.convert import based, llama
from based_jax.convert.fields import Family
from based_jax.convert.folders import CONFIG_FILE, Fields
from based_jax.convert.mamba import MAMBA, MAMBA_SSM
from based_jax.convert.own import MODEL_TYPE, OWN
from based_jax.convert.rwkv import RWKV
from based_jax.errors import unknown

FAMILIES = {
    "gpt2": based.FAMILY,
    "based": based.FAMILY,
    **llama.FAMILIES,
    "mamba": MAMBA,
    "rwkv": RWKV,
    MODEL_TYPE: OWN,
}
"""By `model_type`; a file without one, or with GPT-2's, and with `ssm_cfg`, is a Mamba of its authors."""
LAYOUTS = {"based": based.FAMILY, **llama.FAMILIES, "mamba": MAMBA_SSM, "mamba_hf": MAMBA, MODEL_TYPE: OWN}
"""What `save_hf` writes, by name: of these the first that a model fits, the last of which holds any."""


def family_of(fields: Fields) -> Family:
    """Return the family of a config.json.

    Raises:
      UserError: its models are not known here.
    """
    kind = fields.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown(f"model_type of {CONFIG_FILE}", str(kind), FAMILIES)
    return MAMBA_SSM if FAMILIES[kind] is based.FAMILY and "ssm_cfg" in fields else FAMILIES[kind]
