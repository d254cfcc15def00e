"""What is written down says nothing of where things lie on a machine."""

from pathlib import Path

from adafuse import paths


def test_paths_of_this_machine_do_not_stay_in_what_is_written_down(tmp_path: Path) -> None:
    root, home = paths.ROOT, Path.home()
    text = f'File "{root}/src/a.py", line 3\n{tmp_path}/model (at {home}/x) '
    text += f"https://a.org/b runs_dir={root} 3/4 /nonesuch/x"
    assert paths.without_paths(text) == (
        'File "src/a.py", line 3\n.../model (at ~/x) https://a.org/b runs_dir=. 3/4 /nonesuch/x'
    )
