"""The page is complete in itself; sentences turn with the measurements; the script draws, checks and compares."""

import base64
import gzip
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml

from adafuse import report
from adafuse.report import page
from adafuse.report.claims import all_claims
from synthetic.board import PAPER, SPECS, Made, around, minus, paper_cell
from synthetic.report import GPU, settings

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"kind": "block", "position": 0, "tokens": 64, "excluded": None, "state": {}}
ARMS = ("base", "base_again", "mola_loop", "adafuse_switch")
TIMES = {"base": 10.0, "base_again": 10.0, "mola_loop": 105.0, "adafuse_switch": 12.0}


@pytest.fixture
def board():
    return Made()


def said(board, name):
    """The sentence of one id, or None."""
    spec = next(own for own in SPECS["claims"]["sentences"] if own["id"] == name)
    cells = board.cells
    return page.sentence(cells, spec, all_claims(cells, SPECS["claims"], PAPER))


def test_there_are_at_most_six_sentences_and_none_without_records(board):
    specs = SPECS["claims"]["sentences"]
    assert len(specs) <= 6 and not any(page.sentence(board.cells, spec, []) for spec in specs)
    assert all(spec["text"] != spec["turned"] for spec in specs)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (3.1, "is replicated on an NVIDIA H200"),
        (2.0, "is replicated in part on"),
        (1.0, "is not replicated on"),
    ],
)
def test_speed_where_the_paper_measured(board, factor, words):
    paper_cell(board, dict.fromkeys(("mola_loop", "pesc_loop", "moral_loop"), factor))
    text = said(board, "speed")
    assert words in text and f"{factor / 1.29:.2f} [" in text and "2.4" in text


def test_rivals_in_their_best_form_stand_beside_the_loops_that_authors_ship(board):
    paper_cell(board, dict.fromkeys(("mola_loop", "pesc_loop", "moral_loop"), 3.1))
    assert "best form" not in said(board, "speed"), "not measured"
    eager, graph = board.cell("attribution", "controls"), board.cell("graph", "the headline's", rank=16)
    for row, ms in (("mola_gather", 5.0), ("pesc_gather", 4.0), ("moral_gather", 6.0)):
        board.row(eager, row, {"ms_per_token": ms, "over.adafuse_switch": around(ms / 4)})
        again = {"ms_per_token": ms, "over.adafuse_switch_graph": around(ms / 8)}
        board.row(graph, f"{row}_graph", again)
    assert "Against the best form of each rival, launched alike, it is 1.00 [" in said(board, "speed")
    assert said(board, "speed").endswith("times faster: not replicated.")
    for row, ratio in (("adafuse_gather_graph", 1.06), ("adafuse_switch_graph", 2.06)):
        board.row(graph, row, {"ratio": around(ratio, 0.01)})
    told = said(board, "captured")
    assert "The fastest rival takes 0.50 [" in told and told.endswith(
        "the claim of speed is not replicated there."
    )


def test_a_cpu_concludes_nothing_about_speed(board):
    paper_cell(board, machine="CPU")
    assert said(board, "speed") == ""


@pytest.mark.parametrize(
    ("merged", "words"),
    [(2.06, "the gain was in launches saved, not in merging"), (1.05, "merging is not what costs")],
)
def test_without_launches(board, merged, words):
    far = board.cell("graph", "another rank", rank=64)
    near = board.cell("graph", "the headline's", rank=16)
    for place, ratio in ((far, 9.0), (near, merged)):
        board.row(place, "adafuse_gather_graph", {"ratio": around(1.06, 0.01)})
        board.row(place, "adafuse_switch_graph", {"ratio": around(ratio, 0.01)})
    text = said(board, "captured")
    assert words in text and f"{merged:.2f} [" in text and "9.0" not in text


@pytest.mark.parametrize(
    ("points", "p", "words"),
    [
        (0.0, 0.01, "worse in none of 2 studies"),
        (-6.0, 0.9, "worse in 1 of 2 studies. In the first (backbone small) it is worse"),
    ],
)
def test_one_gate(board, points, p, words):
    for experiment, model, own, test in (("table2", "small", points, p), ("table3", "medium", 0.0, 0.01)):
        place = board.cell(experiment, model, task="evaluate", model=model)
        board.row(place, "adafuse", minus(own, 1.0, p=test), method="adafuse")
    assert words in said(board, "one_gate") and "one LoRA" not in said(board, "one_gate")


def test_one_gate_is_held_against_plain_lora_where_that_was_measured(board):
    place = board.cell("table2", "small", task="evaluate", model="small")
    differences = minus(0.0, 1.0) | minus(-5.0, 1.0, other="lora", p=0.9)
    board.row(place, "adafuse", differences, method="adafuse")
    expected = r"one LoRA of equal size it is worse: -5\.0 \[.*\] points \(backbone small\)"
    assert re.search(expected, said(board, "one_gate"))


def test_the_same_weights_again_are_no_further_study(board):
    for experiment, model, other in (("table2", "tiny", "again"), ("table3", "again", "tiny")):
        place = board.cell(experiment, model, task="evaluate", model=model)
        board.row(place, "adafuse", minus(0.0, 1.0), method="adafuse")
        board.numbers(place, "study", {"same_weights": other})
    assert "worse in none of 1 studies" in said(board, "one_gate")


def test_few_seeds_conclude_nothing(board):
    place = board.cell("table2", task="evaluate")
    board.row(place, "adafuse", minus(-6.0, 1.0, n=4), method="adafuse")
    assert said(board, "one_gate") == ""


@pytest.mark.parametrize(
    ("points", "words"), [(-10.0, "falls behind a gate per layer"), (-1.0, "does not fall behind")]
)
def test_same_tokens_are_judged_from_the_best_place(board, points, words):
    place = board.cell("gate_input", task="evaluate", model="small")
    for row, average, own in (("first_linear", 0.6, -20.0), ("embedding", 0.7, points)):
        board.row(place, row, minus(own, 2.0) | {"accuracy.average": average}, method="adafuse")
    text = said(board, "same_tokens")
    assert words in text and f"{points:+.1f} [" in text


@pytest.mark.parametrize(
    ("cost", "words"), [(-0.5, "With 40 % of them left to the backbone"), (-9.0, "Only for 7 % of them")]
)
def test_what_accuracy_can_spare(board, cost, words):
    place = board.cell("bypass", task="evaluate", model="small")
    for share, own in ((0.07, -0.5), (0.4, cost), (0.9, 0.0 if cost < -1 else -9.0)):
        board.row(place, f"at {share}", minus(own, 1.0, "adafuse") | {"bypassed": share}, method="adafuse")
    assert words in said(board, "bypass")


def test_nothing_can_be_spared(board):
    place = board.cell("bypass", task="evaluate")
    board.row(place, "least", minus(-9.0, 1.0, "adafuse") | {"bypassed": 0.05}, method="adafuse")
    assert "Only for 0 % of them is a loss of 2 points of accuracy ruled out." in said(board, "bypass")


@pytest.mark.parametrize(("half", "words"), [(0.8, "do not show in answers"), (3.0, "may show in answers")])
def test_rounding(board, half, words):
    place = board.cell("generation_drift", task="evaluate", model="small")
    board.row(place, "switch bfloat16 (restored=False)", minus(0.0, half, "dense"), method="adafuse")
    board.row(board.cell("table2", task="evaluate"), "mola", minus(0.0, 1.0, "lora"))
    assert words in said(board, "deploy")


def test_what_to_deploy_turns_with_the_first_that_is_better_than_plain_lora(board):
    place = board.cell("table2", task="evaluate")
    for row, points in (("mola", -1.0), ("pesc", 0.0)):
        board.row(place, row, minus(points, 1.0, "lora"))
    assert "In none of 2 comparisons" in said(board, "deploy") and "captured" not in said(board, "deploy")
    board.row(place, "mixlora", minus(4.0, 1.0, "lora", p=0.9))
    assert "In 1 of 3 comparisons" in said(board, "deploy")
    graph = board.cell("graph", "the headline's", rank=16)
    for row, ratio in (("adafuse_gather_graph", 1.06), ("adafuse_switch_graph", 2.06)):
        board.row(graph, row, {"ratio": around(ratio, 0.01)})
    assert "read them in a captured step" in said(board, "deploy")


# -- the whole, from records


def lines(factor=1.0):
    """Three rounds of each arm with its checks and counts."""
    for arm in ARMS:
        yield {
            "kind": "check",
            "arm": arm,
            "check": "logits",
            "value": 0.01,
            "bound": 0.1,
            "passed": True,
            "detail": "logits",
        }
        yield {
            "kind": "cost",
            "arm": arm,
            "params": 7e9,
            "macs": 6e9,
            "bytes_per_token": 1.3e10,
            "floor_ms": 3.0,
        }
        for number in range(3):
            ms = TIMES[arm] * (factor if arm == "mola_loop" else 1.0)
            yield RUNS | {"arm": arm, "round": number, "block_ms": 64 * ms * (1 + 0.001 * number)}


@pytest.fixture
def records(made):
    """Two processes of a cell that serves two experiments; returns the folder in which they lie."""
    rows = ["experiment,profile,task,overrides,record"]
    for key in "ab":
        record = made(key * 12, lines=lines(), arms=ARMS)
        rows += [f"{experiment},gpu,latency,,{key * 12}" for experiment in ("table1", "attribution")]
    (record.path.parent.parent / "membership.csv").write_text("\n".join(rows) + "\n")
    return record.path.parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, records, tmp_path, capsys, monkeypatch):
    """The script on the records, written into `results`: exit code, stdout, lines of stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = script.main(["--records", str(records), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().splitlines()

    return call


class Reader(HTMLParser):
    """Collects what a page loads, its ids and its links, and whether tags are closed."""

    def __init__(self):
        super().__init__()
        self.loads, self.ids, self.targets = [], [], []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.ids += [known["id"]] if "id" in known else []
        if tag == "a" or (tag == "use" and "xlink:href" in known):
            self.targets.append(known.get("href") or known["xlink:href"])
        elif known.get("src") or (tag == "link") or known.get("href", "#")[0] != "#":
            self.loads.append((tag, known))


def test_the_page_loads_nothing_and_every_link_has_a_target(run, tmp_path):
    assert run("--out", "results")[0] == 0
    text = (tmp_path / "results" / "report.html").read_text()
    found = Reader()
    found.feed(text)
    assert not found.loads and "@import" not in text and not re.search(r"url\(\s*['\"]?http", text)
    assert all(target.startswith("#") for target in found.targets)
    missing = {target[1:] for target in found.targets} - set(found.ids)
    assert not missing and len(found.ids) == len(set(found.ids))
    assert {"answer", "claims", "figures", "tables", "machines", "records"} <= set(found.ids)
    # a claim leads to its measurement, its check and its records
    (row,) = re.findall(r"<tr><td class=\"claim\">MoLA: a token costs.*?</tr>", text, re.DOTALL)
    assert 'href="#table1-' in row and 'href="#checks-' in row and 'href="#raaaaaaaa"' in row
    assert "<svg" in text and "Xeon, 16 cores" in text and "<?xml" not in text


def test_the_page_runs_one_script_and_it_is_ours(run, tmp_path):
    run("--out", "results")
    text = (tmp_path / "results/report.html").read_text()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    allowed = dict(one.split(" ", 1) for one in policy.split("; "))
    assert allowed["default-src"] == "'none'" and allowed["base-uri"] == allowed["form-action"] == "'none'"
    (own,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    named = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert allowed["script-src"] == f"'sha256-{named}'" and "hashchange" in own
    assert text.index("Content-Security-Policy") < text.index("<style") < text.index("<script")


# without a slash, from which on a name is a path
HOSTILE = "--><img src=x onerror=alert(1)><script>\x1b]0;mine\x07"


class Tags(HTMLParser):
    """What a browser would take for a script, or for something that starts one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        handlers = [name for name, _ in attributes if name.startswith("on")]
        if tag in ("script", "img", "iframe", "object", "embed") or handlers:
            self.found.append(tag)


def test_names_in_records_are_text_wherever_they_are_shown(run, made, records, tmp_path):
    label = {"label": HOSTILE, "method": "mola", "strategy": "loop", "runtime": "eager"}
    arms = settings(arms=ARMS)["arms"]
    arms["table"]["mola_loop"] = label
    header = {"machine": GPU | {"cpu": HOSTILE, "driver": HOSTILE}, "versions": {"torch": HOSTILE}}
    model = {"name": HOSTILE, "path": None, "dtype": "bfloat16", "shape": {}}
    error = {"kind": "error", "where": HOSTILE, "message": HOSTILE, "traceback": HOSTILE}
    record = made("c" * 12, lines=[*lines(), error], status="error", header=header, arms=arms, model=model)
    record.path.rename(record.path.with_name("<img src=x>" + record.path.name))
    (tmp_path / "README.md").write_text(f"{page_markers()}\n")
    shown = ""
    for arguments in (["--out", "own"], ["--out", "results", "--readme", "README.md"]):
        code, out, errors = run(*arguments)
        shown += out + "\n".join(errors)
        assert code == 0
    assert "alert(1)" in shown and "\x1b]" not in shown and "\x07" not in shown
    parser = Tags()
    parser.feed((tmp_path / "own/report.html").read_text())
    assert parser.found == ["script"], "and that one is ours"
    written = [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.svg")]
    assert any("alert(1)" in path.read_text() for path in written)
    for path in written:
        assert not re.search("<(script|img)", path.read_text()), path


def test_draw_then_check(run, tmp_path):
    (tmp_path / "README.md").write_text(f"# Title\n\n{page_markers()}\n\nEnd.\n")
    code, out, errors = run("--out", "results", "--readme", "README.md")
    assert (code, errors) == (0, []) and "replicated" in out and "2 records: 0 with errors" in out
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title") and text.endswith("End.\n") and "| Tables 1, 5 | MoLA" in text
    docs = (tmp_path / "docs" / "results.md").read_text()
    assert "](../results/figures/" in docs and "](../results/report.html)" in docs and "1. Launched" in docs
    assert not (tmp_path / "results" / "tables").exists(), "the page says it all"
    assert run("--out", "results", "--readme", "README.md", "--check")[0] == 0
    found = sorted((tmp_path / "results" / "figures").glob("*.svg"))
    changes = (
        (tmp_path / "README.md", "MoLA", "MoLa"),
        (tmp_path / "docs" / "results.md", "MoLA", "MoLa"),
        (tmp_path / "results" / "claims.csv", "MoLA", "MoLa"),
        (tmp_path / "results" / "report.html", "MoLA", "MoLa"),
        (found[0], "stroke", "strike"),
    )
    numbers = tmp_path / "results" / "measurements.csv.gz"
    kept, packed = {path: path.read_text() for path, *_ in changes}, numbers.read_bytes()
    for path, old, new in changes:
        path.write_text(kept[path].replace(old, new, 1))
    numbers.write_bytes(gzip.compress(gzip.decompress(packed).replace(b"mola_loop", b"mola_lop", 1)))
    code, _, errors = run("--out", "results", "--readme", "README.md", "--check")
    assert code == 1 and len(errors) == 1
    assert f"in {', '.join(sorted(path.name for path in [*kept, numbers]))}: " in errors[0], (
        "these and no others"
    )
    for path, text in kept.items():
        path.write_text(text)
    numbers.write_bytes(packed)
    assert run("--out", "results", "--check")[0] == 0, "without a README the rest is compared"
    found[0].unlink()
    assert run("--out", "results", "--check")[0] == 1


def test_a_run_of_ones_own_has_all_tables_and_verdicts_for_programs(run, tmp_path):
    assert run("--out", "own")[0] == 0
    names = {own["name"] for own in SPECS["tables"]["tables"]}
    assert {path.stem for path in (tmp_path / "own" / "tables").glob("*.md")} == names
    assert "| MoLA | 105 |" in (tmp_path / "own" / "tables" / "table1.md").read_text()
    assert "MoLA: a token costs" in (tmp_path / "own" / "results.md").read_text()
    found = pd.read_csv(tmp_path / "own" / "claims.csv").set_index("id")
    mola = found.loc["time.mola_loop"]
    assert mola["low"] <= mola["value"] <= mola["high"] and mola["verdict"] == "replicated"
    assert mola["records"].split() == ["a" * 12, "b" * 12] and "gather.r16.b1" in found.index


def page_markers():
    return "<!-- results:begin -->\n<!-- results:end -->"


def test_the_same_records_give_the_same_bytes(run, tmp_path):
    for name in ("one", "two"):
        run("--out", name)
    assert (tmp_path / "one" / "report.html").is_file()
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file() and path.suffix != ".png":
            assert (
                path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
            ), path


def test_a_last_digit_of_a_coordinate_is_not_a_difference(script, tmp_path):
    for name, text in (("a", "M 1.0001 2"), ("b", "M 1.0002 2"), ("c", "M 1.5 2")):
        (tmp_path / f"{name}.svg").write_text(f"<svg>{text}</svg>")
    assert script._same(tmp_path / "a.svg", tmp_path / "b.svg")
    assert not script._same(tmp_path / "a.svg", tmp_path / "c.svg")


def test_the_block_is_small(run, tmp_path, records):
    told = page.page(report.read(records))
    assert len(page.readme_block(told).encode()) <= page.BLOCK_BYTES


def test_a_record_in_no_membership_and_one_that_is_none_are_named(run, records):
    (records / "membership.csv").write_text(
        "experiment,profile,task,overrides,record\ntable1,gpu,latency,,aaaaaaaaaaaa\n"
    )
    (records / "latency" / "stray-cccccccccccc.jsonl.partial").write_text("{}\n")
    code, out, errors = run("--out", "results")
    assert code == 0 and "in no membership: latency/tiny-bbbbbbbbbbbb.jsonl" in out
    assert len(errors) == 1 and "stray-cccccccccccc" in errors[0]


def test_records_of_uncommitted_sources_are_not_published(run, made, tmp_path):
    made("d" * 12, lines=lines(), arms=ARMS, header={"dirty": True})
    (tmp_path / "README.md").write_text(page_markers())
    code, _, errors = run("--out", "results", "--readme", "README.md")
    assert code == 1 and len(errors) == 1 and "uncommitted" in errors[0]
    assert run("--out", "results")[0] == 0


def test_ones_own_run_beside_the_published_one(run, tmp_path):
    run("--out", "results")
    code, out, _ = run("--compare", "results/measurements.csv.gz", "--out", "own")
    assert code == 0 and "different" not in out.split("## ")[0].split("\n")[-1]
    assert (tmp_path / "own" / "compare.md").read_text() in out and "## " not in out
    kept = gzip.decompress((tmp_path / "results" / "measurements.csv.gz").read_bytes()).decode()
    (tmp_path / "results" / "plain.csv").write_text(
        re.sub(r"(mola_loop,ratio),[^,]*,[^,]*,[^,]*", r"\1,2.0,1.9,2.1", kept)
    )
    assert "## Different beyond the intervals" in run("--compare", "results/plain.csv")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "results", "--readme", "README.md"], "README.md"),
        (["--out", "results", "--membership", "none.csv"], "none.csv"),
        (["--compare", "none.csv"], "none.csv"),
        ([], "--out"),
    ],
    ids=["no README", "no membership", "nothing to compare with", "nowhere"],
)
def test_bad_input_is_one_line(run, arguments, words):
    code, _, errors = run(*arguments)
    assert code == 1 and len(errors) == 1 and words in errors[0]


def test_the_script_runs_by_itself(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report.py"),
        "--records",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no records found" in done.stderr and "Traceback" not in done.stderr


def test_no_torch_is_needed():
    code = (
        "import sys; import adafuse.report.page; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_specifications_name_experiments_that_exist():
    known = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} | {""}
    every = [
        SPECS["claims"]["groups"],
        SPECS["claims"]["goals"],
        SPECS["claims"]["sentences"],
        SPECS["tables"]["tables"],
    ]
    named = [
        group.get("experiments", [])
        for specs in every
        for spec in specs
        for group in spec.get("groups", [spec])
    ]
    assert {name for names in named if names != "all" for name in names} <= known
    assert yaml.safe_dump(SPECS["claims"])
