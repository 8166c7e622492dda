# %% [markdown]
# # The frontier: recall against bytes of state
#
# Each finished run of a sweep is a row in a store, a folder of JSON lines. Pictures and tables read nothing else.
# This is the committed store of the paper's Figure 2: MQAR up to 1,024 tokens with 256 pairs
# (`experiments/mqar_pareto`).

# %% tags=["parameters"]
families = ["Based", "Sliding window", "Mamba", "Gated DeltaNet", "Attention"]

# %%
import html
import io
import tempfile
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Image

from based_jax.pictures import figures, page
from based_jax.pictures.configurations import configurations
from based_jax.store import Store

# %%
rows = Store("../mqar_pareto/results/figure2").rows()
print(f"{len(rows)} runs by {', '.join(sorted({row['device'] for row in rows}))}")

# %% [markdown]
# Two recipes of initial values are in this store; a picture is of one. Rows that name none are the older ones.

# %%
rows = [row for row in rows if "init_recipe" not in row["config"]["model"]]
points = [point for point in configurations(rows) if point.family in families]
table = pd.DataFrame(
    {
        "family": point.family,
        "model": point.label,
        "KiB of state": point.state_bytes(convolution=False) / 1024,
        "accuracy": point.median,
        "runs": len(point.rows),
    }
    for point in points
)
best = table.sort_values("accuracy", ascending=False).groupby("family").head(2)
best.sort_values("KiB of state").round(3).reset_index(drop=True)

# %% [markdown]
# A point is the best learning rate of each seed, then the median over seeds. Filter the rows, and draw what is left.

# %%
chosen = [row for point in points for row in point.rows]
picture = io.BytesIO()
figures.frontier_figure(chosen).savefig(picture, dpi=130)
Image(picture.getvalue())

# %% [markdown]
# The same rows as a page: click a point for its layers, its learning rates and its test segments; families, bytes of
# convolutions and zoom are above and beside it. Nothing is fetched, so that it can be kept or sent as one file.

# %%
file = page.write(chosen, Path(tempfile.mkdtemp()) / "frontier.html", title="Recall against bytes of state")
frame = f'<iframe srcdoc="{html.escape(file.read_text())}" width="100%" height="620" style="border:0"></iframe>'
HTML(f"<div>{frame}</div>")
