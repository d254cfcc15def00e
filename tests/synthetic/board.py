"""Cells made by hand: rows and numbers that a test chooses."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from adafuse.report.claims import cells
from adafuse.report.measurements import CellName, Measured, RowName, told

RESULTS = Path(__file__).resolve().parents[2] / "results"
SPECS = {name: yaml.safe_load((RESULTS / f"{name}.yaml").read_text()) for name in ("claims", "tables")}
PAPER = yaml.safe_load((RESULTS / "paper_tables.yaml").read_text())
SHAPE = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA = {"model": "llama2_7b", "dtype": "bfloat16", "path": None, "shape": SHAPE, "count": 8, "top_k": 2}
LLAMA |= {"targets": "q, k, v, o, gate, up, down", "rank": 16, "batch": 1, "context": 128, "task": "latency"}
LABELS = {"base": "Backbone", "mola_loop": "MoLA", "pesc_loop": "PESC", "moral_loop": "MoRAL"}
LABELS |= {"moral_simple_merge": "MoRAL (simple merge)", "adafuse_simple_merge": "AdaFuse (simple merge)"}
LABELS |= {"adafuse_switch": "AdaFuse (switch)", "adafuse_gather_graph": "AdaFuse (gather, graph)"}
# time over the backbone's, parameters, MACs and peak memory, as if the paper were right
FACTORS = {"base": 1.0, "mola_loop": 10.5, "pesc_loop": 3.5, "moral_loop": 3.55, "moral_simple_merge": 1.88}
FACTORS |= {"adafuse_simple_merge": 1.75, "adafuse_switch": 1.29}
PARAMS = {
    "base": 6.74e9,
    "mola_loop": 7.07e9,
    "pesc_loop": 6.97e9,
    "moral_loop": 6.97e9,
    "adafuse_switch": 7.06e9,
}
MACS = {"base": 6.61e9, "mola_loop": 6.65e9, "pesc_loop": 6.64e9, "moral_loop": 6.67e9}
PEAKS = {"base": 12.9, "mola_loop": 26.3, "pesc_loop": 13.1, "moral_loop": 13.3, "adafuse_switch": 13.8}


@dataclass(frozen=True)
class Measurement:
    """One number as a line of a frame has it."""

    experiment: str
    cell: str
    row: str
    quantity: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int | None = None
    reason: str = ""
    records: tuple[str, ...] = ()


def frame_of(values):
    """These measurements as `Measured.values`."""
    return told(pd.DataFrame([vars(value) for value in values]))


class Place(NamedTuple):
    """Where a cell is."""

    experiment: str
    cell: str


class Made:
    """Grows by cells and rows; a number is a value, (value, low, high, n), or a reason."""

    def __init__(self):
        self.values, self.names, self.rows, self.runs = [], [], [], {}

    @property
    def cells(self):
        measured = Measured(frame_of(self.values), self.names, self.rows)
        return cells(measured, pd.DataFrame.from_dict(self.runs, orient="index", dtype=object))

    def cell(self, experiment, cell="cell", machine="NVIDIA H200", **facts):
        place = Place(experiment, cell)
        name = CellName(*place, f"{machine} · {cell}", "a caption", machine, machine == "CPU")
        self.names.append(name)
        record = f"{len(self.runs):012x}"
        self.runs[record] = LLAMA | {"machine": machine, "cpu": "Xeon", "record": record} | facts
        return place

    def row(self, place, row, numbers, label="", method="", routing="", strategy="", runtime="eager"):
        own = RowName(*place, row, label or LABELS.get(row, row), method, routing, strategy, runtime)
        self.rows.append(own)
        self.numbers(place, row, numbers)

    def numbers(self, place, row, numbers):
        index = [tuple(cell) for cell in (Place(c.experiment, c.cell) for c in self.names)].index(
            tuple(place)
        )
        record = [*self.runs][index]
        for quantity, given in numbers.items():
            value, low, high, n = (
                (*given, 3)[:4] if isinstance(given, tuple) else (given, math.nan, math.nan, 1)
            )
            if isinstance(given, str):
                own = Measurement(*place, row, quantity, reason=given, records=(record,))
            else:
                how = "" if math.isnan(low) else f"t over {n} processes"
                own = Measurement(*place, row, quantity, value, low, high, n, how, (record,))
            self.values.append(own)


def around(value, width=0.02, n=3):
    """A ratio with an interval of so many per cent to either side."""
    return value, value / (1 + width), value * (1 + width), n


def paper_cell(
    made, factors=None, experiment="table1", machine="NVIDIA H200", width=0.02, without=(), **facts
):
    """The paper's rows on one cell; `factors` are times over the backbone's; rows in `without` failed their check."""
    place = made.cell(experiment, f"{experiment} {machine}", machine, **facts)
    times = FACTORS | (factors or {})
    for row, time in times.items():
        numbers = {
            "params": PARAMS.get(row, 7e9),
            "macs": MACS.get(row, 6.65e9),
            "peak_gib": PEAKS.get(row, "not measured"),
        }
        if row in without:
            numbers |= {
                "ms_per_token": "check failed: logits",
                "ratio": "no time",
                "over.adafuse_switch": "no time",
            }
        else:
            numbers |= {"ms_per_token": 10 * time, "ratio": around(time, width)}
            others = {
                other: time / own for other, own in times.items() if other not in (row, "base", *without)
            }
            numbers |= {f"over.{other}": around(ratio, width) for other, ratio in others.items()}
        made.row(place, row, {name: own for name, own in numbers.items() if (row, name) != ("base", "ratio")})
    made.numbers(place, "eager", {"resolution": 0.01, "processes": 3, "rounds": 9})
    return place


def minus(points, half, other="adafuse_layerwise", n=5, p=None, spread=1.0):
    """A paired difference in points, with the test of equivalence."""
    value, wide, narrow = points / 100, half / 100, 0.77 * half / 100
    own = {f"minus.{other}": (value, value - wide, value + wide, n), f"p.{other}": 0.01 if p is None else p}
    return own | {
        f"minus90.{other}": (value, value - narrow, value + narrow, n),
        f"spread.{other}": spread / 100,
    }
