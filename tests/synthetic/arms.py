"""The arms of the made-up records: names as in conf/arms, times that make every ratio known."""

# arm: label, method, strategy, ms per token
ARMS: dict[str, tuple[str, str, str, float]] = {
    "base": ("Backbone", "base", "dense", 2.0),
    "base_again": ("Backbone (again)", "base", "dense", 2.0),
    "mola_loop": ("MoLA", "mola", "loop", 12.0),
    "pesc_loop": ("PESC", "pesc", "loop", 5.0),
    "moral_loop": ("MoRAL", "moral", "loop", 7.2),
    "moral_simple_merge": ("MoRAL (simple merge)", "moral", "simple_merge", 4.4),
    "adafuse_simple_merge": ("AdaFuse (simple merge)", "adafuse", "simple_merge", 3.6),
    "adafuse_switch": ("AdaFuse (switch)", "adafuse", "switch", 2.7),
    "lora_dense": ("LoRA (unmerged)", "lora", "dense", 2.9),
    "lora_rebase": ("LoRA (merged once)", "lora", "rebase", 2.003),
    "mixlora_loop": ("MixLoRA", "mixlora", "loop", 4.9),
    "mixlora_gather": ("MixLoRA (gather)", "mixlora", "gather", 3.1),
    "mola_gather": ("MoLA (gather)", "mola", "gather", 3.9),
    "adafuse_gather": ("AdaFuse (gather)", "adafuse", "gather", 2.6),
    "adafuse_rebase": ("AdaFuse (rebase)", "adafuse", "rebase", 3.3),
    "base_graph": ("Backbone (graph)", "base", "dense", 1.0),
    "base_graph_again": ("Backbone (graph, again)", "base", "dense", 1.0),
    "base_gemv_graph": ("Backbone (own GEMV, graph)", "base", "fused", 0.95),
    "lora_gather_graph": ("LoRA (gather, graph)", "lora", "gather", 1.06),
    "mola_masked_loop_graph": ("MoLA (masked loop, graph)", "mola", "masked_loop", 2.6),
    "mola_gather_graph": ("MoLA (gather, graph)", "mola", "gather", 1.3),
    "adafuse_gather_graph": ("AdaFuse (gather, graph)", "adafuse", "gather", 1.08),
    "adafuse_fused_graph": ("AdaFuse (fused, graph)", "adafuse", "fused", 1.02),
    "adafuse_switch_graph": ("AdaFuse (switch, graph)", "adafuse", "switch", 2.9),
    "base_compiled": ("Backbone (compiled)", "base", "dense", 0.8),
    "base_compiled_again": ("Backbone (compiled, again)", "base", "dense", 0.8),
    "adafuse_gather_compiled": ("AdaFuse (gather, compiled)", "adafuse", "gather", 0.96),
    "adafuse_fused_compiled": ("AdaFuse (fused, compiled)", "adafuse", "fused", 0.83),
}
ROUTING = {
    "base": "none",
    "lora": "none",
    "mola": "layerwise",
    "moral": "layerwise",
    "pesc": "blockwise",
    "mixlora": "blockwise",
    "adafuse_layerwise": "layerwise",
    "adafuse": "token",
}
EAGER = [name for name in ARMS if "_graph" not in name and "_compiled" not in name]
PAPER_ARMS = EAGER[:8]
GRAPH = [name for name in ARMS if "_graph" in name]
COMPILED = [name for name in ARMS if "_compiled" in name]
TWIN = "adafuse_layerwise_gather_graph"
ARMS[TWIN] = ("AdaFuse layer-wise (gather, graph)", "adafuse_layerwise", "gather", 1.09)
ARMS["adafuse_loop"] = ("AdaFuse (loop)", "adafuse", "loop", 18.0)
ARMS["adafuse_dense"] = ("AdaFuse (dense)", "adafuse", "dense", 3.7)
# arms=NAME: the arms that it runs
RUNS = {
    "twin": [*GRAPH, TWIN],
    "paper": PAPER_ARMS,
    "controls": ["base", "base_again", *EAGER[8:], "adafuse_switch"],
    "strategies": ["base", "base_again", "adafuse_loop", "adafuse_gather", "adafuse_dense", "adafuse_switch"],
    "graph": GRAPH,
    "compiled": COMPILED,
    "mixed": ["base", "base_again", "adafuse_gather", "mola_gather", *GRAPH, *COMPILED],
    "no_base": ["base", "base_again", "adafuse_gather", "adafuse_gather_graph", "adafuse_fused_graph"],
}


def runtime(arm: str) -> str:
    """The runtime that an arm's name ends in (or its A/A twin's)."""
    return next((name for name in ("graph", "compiled") if f"_{name}" in arm), "eager")
