"""A look inside a trained model: where its layers read from, what their states do, and what each layer is worth.

from based_jax import inside

for layer in inside.attention_maps(model, ids):     # those of attention, windows and Taylor attention
    print(layer.layer, layer.kind, inside.effective_range(layer.weights), inside.entropy(layer.weights))
norms = inside.state_norms(model, ids)              # (B, T, L)
costs = inside.removal_costs(model, batches)        # what leaving a layer out costs
"""

from based_jax.inside.layers import blocks_of, mixer_inputs, without_layer
from based_jax.inside.maps import LayerMap, attention_maps, attention_weights, softmax_weights
from based_jax.inside.measures import Removal, effective_range, entropy, removal_costs, state_norms, total_variation

__all__ = [
    "LayerMap",
    "Removal",
    "attention_maps",
    "attention_weights",
    "blocks_of",
    "effective_range",
    "entropy",
    "mixer_inputs",
    "removal_costs",
    "softmax_weights",
    "state_norms",
    "total_variation",
    "without_layer",
]
