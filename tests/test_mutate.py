"""scripts/mutate.py: a mutant that the tests of a toy kill, and one that they let live."""

from pathlib import Path

from synthetic.scripts import script

TOY = "def larger(a: int | None, b: int) -> int:\n    return a if a > b else b\n"
TEST = "from toy import larger\n\ndef test_larger():\n    assert larger(2, 1) == 2 and larger(1, 2) == 2\n"


def test_a_toy(tmp_path: Path) -> None:
    mutate = script("mutate")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TEST)
    found = {
        what: mutate.verdict(tmp_path, "src/toy.py", mutated, [str(tmp_path / "test_toy.py")])
        for _, what, mutated in mutate.mutants(TOY)
    }
    assert found == {"a > b  ->  a >= b": "survived", "a if a > b else b  ->  a if True else b": "killed"}
