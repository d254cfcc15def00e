"""The frozen backbone: loading it, where its linears are, joined projections, clean copies of its weights."""
