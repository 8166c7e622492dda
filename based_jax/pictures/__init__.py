"""Pictures of a store's rows: the frontier of recall against bytes of state, tables, and a page to explore.

They read rows alone, whoever wrote them: nothing here imports `based_jax.sweep`, and nothing there imports this.
"""
