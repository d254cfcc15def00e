"""What a study imports and reads, once for all of its processes: multiprocessing's forkserver preloads this."""

from importlib import import_module

from synthetic.configurations import compose
from synthetic.whole import JOBS

for name in (
    *("lm_eval.evaluator", "matplotlib.backends.backend_svg", "rich.console", "rich.table"),
    *("transformers.models.llama.modeling_llama", "adafuse.bench.latency", "adafuse.evaluation.harness"),
    *("adafuse.evaluation.stage", "adafuse.report.page", "adafuse.training.stage"),
):
    import_module(name)
compose(*(job for job in JOBS[2:] if not job.startswith("task=")))
