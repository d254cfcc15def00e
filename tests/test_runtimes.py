"""An arm is compared with the backbone in its own runtime: ratios, the A/A pair, tables, timing, the figure."""

import pytest

import synthetic
from adafuse.records import load
from adafuse.report import draw, evidence, figures, find, sheet, style, tables, timing
from adafuse.report.cells import Cell
from synthetic_arms import ARMS


def cell_of(folder, arms: str = "mixed", processes: int = 2, **changes) -> Cell:
    for replicate in range(processes):
        synthetic.write_latency(folder, replicate, arms, **changes)
    (cell,) = find(load([folder])).latency
    return cell


def attribution(cell: Cell) -> sheet.Sheet:
    return tables.attribution([cell], find(list(cell.records)).paper)


def by_arm(table: sheet.Sheet) -> dict[str, dict]:
    return {row["arm"]: row for row in table.sections[0].rows}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Cell:
    """A cell with arms of all three runtimes."""
    return cell_of(tmp_path_factory.mktemp("records"))


@pytest.mark.parametrize(
    ("arm", "base"),
    [
        ("adafuse_gather", "base"),
        ("adafuse_gather_graph", "base_graph"),
        ("adafuse_gather_compiled", "base_compiled"),
        ("base_gemv_graph", "base_graph"),
    ],
)
def test_the_base_is_the_backbone_in_the_same_runtime(mixed, arm, base):
    result = timing.results(mixed)[arm]
    assert result.to_base.base == base and timing.ratio(mixed, arm) == result.ratio
    assert result.ratio.ratio == pytest.approx(ARMS[arm][3] / ARMS[base][3], rel=0.02)


def test_the_noise_is_that_of_the_same_runtime(tmp_path):
    """6 % over the backbone: resolved while only the eager pair is noisy, not when the graph's own pair is."""
    quiet = cell_of(tmp_path / "quiet", factors={"base_again": 1.3})
    noisy = cell_of(tmp_path / "noisy", factors={"base_graph_again": 1.3})
    assert timing.results(quiet)["lora_gather_graph"].resolved
    assert not timing.results(noisy)["lora_gather_graph"].resolved
    assert timing.again(noisy, "graph").ratio == pytest.approx(1.3, rel=0.02)
    assert timing.again(noisy).ratio == pytest.approx(1, rel=0.02)


def test_fused_has_a_second_ratio_to_the_better_backbone(mixed):
    table = attribution(mixed)
    rows = by_arm(table)
    fused = rows["adafuse_fused_graph"]
    assert fused["ratio"].ratio == pytest.approx(1.02, rel=0.02)
    assert fused["gemv_ratio"].ratio == pytest.approx(1.02 / 0.95, rel=0.02)
    assert rows["adafuse_gather_graph"]["gemv_ratio"] is None
    columns = table.sections[0].columns
    show = columns[tables.GEMV_RATIO]
    assert show(rows["base_gemv_graph"]) == "1" and show(rows["adafuse_gather_graph"]) == "–"
    assert "no time of base_gemv_compiled" in show(rows["adafuse_fused_compiled"])


def test_rows_stand_as_run_with_their_runtime_and_strategy(mixed):
    rows = by_arm(attribution(mixed))
    assert list(rows) == mixed.config["arms"]["run"]
    assert [rows[arm]["runtime"] for arm in ("base", "base_graph", "base_compiled_again")] == [
        "eager",
        "graph",
        "compiled",
    ]
    plain = ("base", "base_again", "base_graph", "base_graph_again", "base_compiled")
    assert all(rows[arm]["strategy"] is None for arm in plain)
    assert (
        rows["base_gemv_graph"]["strategy"] == "fused"
        and rows["mola_masked_loop_graph"]["strategy"] == "masked_loop"
    )
    text = sheet.markdown(attribution(mixed))
    line = next(line for line in text.splitlines() if line.startswith("| Backbone (graph) "))
    assert "| graph " in line and "| 1 " in line
    assert tables.CAPTURED in text


def test_a_cell_of_eager_arms_has_no_column_about_our_product(tmp_path):
    table = attribution(cell_of(tmp_path, "controls"))
    assert tables.GEMV_RATIO not in table.sections[0].columns and tables.CAPTURED not in sheet.markdown(table)


def test_records_without_a_runtime_are_eager(tmp_path):
    arms = synthetic.config("controls")["arms"]
    for arm in arms["table"].values():
        del arm["runtime"]
    cell = cell_of(tmp_path, "controls", plain={"arms": arms})
    assert timing.runtimes(cell) == ["eager"]
    assert timing.results(cell)["adafuse_gather"].ratio.ratio == pytest.approx(1.3, rel=0.02)


def test_without_the_base_of_a_runtime_the_ratio_is_empty_and_says_why(tmp_path):
    cell = cell_of(tmp_path, "no_base")
    table = attribution(cell)
    row = by_arm(table)["adafuse_gather_graph"]
    assert row["ms_per_token"] and row["ratio"] is None
    assert "no time of base_graph (not run: arm is not in arms=no_base)" in sheet.markdown(table)
    graph = evidence.timing([cell]).sections[0].rows[1]
    assert graph["runtime"] == "graph" and graph["again"] is None and graph["rounds"] == 16


def test_a_base_that_failed_is_the_reason(tmp_path):
    cell = cell_of(tmp_path, "graph", failed=("base_graph",))
    found = timing.results(cell)["adafuse_gather_graph"]
    assert found.ratio is None and "no time of base_graph (check failed: logits" in found.to_base.reason


def test_timing_has_a_row_for_each_runtime(mixed):
    rows = {row["runtime"]: row for row in evidence.timing([mixed]).sections[0].rows}
    assert list(rows) == ["eager", "graph", "compiled"]
    blocks = {
        name: sum(timing.runtime_of(mixed, arm) == name for arm in mixed.config["arms"]["run"])
        for name in rows
    }
    assert {name: row["blocks"] for name, row in rows.items()} == {name: 16 * n for name, n in blocks.items()}
    assert [row["excluded"] for row in rows.values()] == [2, 0, 0]
    assert all(row["processes"] == 2 and row["rounds"] == 16 for row in rows.values())
    assert len({row["again"].ratio for row in rows.values()}) == 3


def test_the_papers_tables_stay_eager(tmp_path):
    synthetic.write_latency(tmp_path, arms="graph")
    found = find(load([tmp_path]))
    for table in (tables.table1, tables.table5, tables.table6):
        assert "not run in this profile" in sheet.markdown(table(found.latency, found.paper))


def test_the_figure_has_a_panel_for_each_runtime(mixed):
    figure = figures.all_figures([mixed], [], [], find(list(mixed.records)).paper)["latency_mixed"]
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert [title.split("runtime ")[1] for title in titles] == ["eager", "graph", "compiled"]
    labels = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in figure.axes]
    assert labels[0] == ["MoLA (gather)", "AdaFuse (gather)"]
    assert labels[1][0] == "AdaFuse (switch)" and labels[1][-1] == "Backbone (own GEMV)"
    assert not {"Backbone", "Backbone (again)"} & {label for panel in labels for label in panel}
    assert len(figure.legends[0].get_texts()) == 4


def test_several_panels_draw_the_same_bytes_wherever_they_lie_in_memory(mixed, tmp_path):
    found, drawn, kept = find(list(mixed.records)), set(), []
    for number in range(6):
        kept.append([object() for _ in range(1000 * number)])
        figure = figures.all_figures([mixed], [], [], found.paper)["latency_mixed"]
        svg, _ = style.save(figure, tmp_path / str(number))
        drawn.add(svg.read_bytes())
    assert len(drawn) == 1


def test_captured_records_draw_the_same_bytes(tmp_path):
    synthetic.write_latency(tmp_path / "records", arms="mixed")
    for name in ("one", "two"):
        draw(find(load([tmp_path / "records"])), tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), (
            path.name
        )
