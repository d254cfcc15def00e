"""The user's own rows (data.path): read strictly, so that what is wrong with one is said before anything heavy loads.

In: a folder with train.jsonl, validation.jsonl and test.jsonl, one JSON object a line: prompt and answer, or prompt,
choices and label. Out: items; or a ValueError of one line with the file, the line, the field and the reason.
Next: items.py, which writes them beside the generated ones.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from adafuse.data.families import Item
from adafuse.data.splits import SPLITS
from adafuse.data.tokens import END
from adafuse.files import printable

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# far beyond what any model reads; a tokenizer would take minutes over it
MOST_BYTES = 2**20
# categories of characters that have no width
UNSEEN = ("Cc", "Cf")
SHOWN_CHARACTERS = 40
FORM = 'a row is one JSON object a line: {"prompt", "answer"} or {"prompt", "choices", "label"}'


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no text") from None
    if all(character.isspace() or unicodedata.category(character) in UNSEEN for character in text):
        raise ValueError("is blank")
    return text


Text = Annotated[str, AfterValidator(_is_text)]


class Prompt(BaseModel):
    """One line of text to be read alone. Other fields are carried, so that they can be named."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: Text


Form = TypeVar("Form", bound=Prompt)


class Row(Prompt):
    """One line to be answered."""

    answer: Text | None = None
    choices: list[Text] | None = None
    label: int | None = None

    @property
    def target(self) -> str:
        return str(self.answer if self.choices is None else self.choices[self.label or 0])


def fingerprints(folder: str) -> dict[str, str]:
    """SHA-256 of each split's file. Raises ValueError, one line, for the first row that is wrong."""
    hashes = {split: hashlib.sha256(_file(folder, split).read_bytes()).hexdigest() for split in SPLITS}
    _check(folder, tuple(hashes.values()))
    return hashes


def items(folder: str, split: str) -> list[Item]:
    """The rows of a split. Raises ValueError, one line, for the first that is wrong."""
    rows = _rows(_file(folder, split), scored=split == "test")
    return [Item(row.prompt, row.target, row.choices, row.label) for row in rows]


def prompts(file: str) -> list[str]:
    """The texts of latency.prompts, one {"prompt"} a line. Raises ValueError, one line, for the first that is wrong."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f'latency.prompts={file} is not a file: name one of lines {{"prompt": TEXT}}, as '
            "`python scripts/prepare.py sharegpt` makes"
        )
    return [_valid(Prompt, path, number, line).prompt for number, line in enumerate(_lines(path), start=1)]


def checked(given: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Rows that are in memory already, as strictly as those of a file. Raises ValueError, one line, for the first that
    is wrong, with its place from 1 on.
    """
    rows = []
    for number, one in enumerate(given, start=1):
        try:
            line = json.dumps(dict(one)).encode()
        except (TypeError, ValueError):
            _refuse(Path("items"), number, None, FORM)
        rows.append(_row(Path("items"), number, line))
    if not rows:
        raise ValueError(f"items is empty: give it at least one ({FORM})")
    return [Item(row.prompt, row.target, row.choices, row.label) for row in rows]


def task_of(folder: str) -> str:
    """The lm-eval task that asks these rows. Raises ValueError, one line, for the first that is wrong."""
    return (
        "local_answers" if _rows(_file(folder, "test"), scored=True)[0].choices is None else "local_choices"
    )


def notices(folder: str) -> Iterator[str]:
    """What is not refused, and yet the user should know."""
    rows = {split: _rows(_file(folder, split), scored=False) for split in SPLITS}
    unused = sorted({name for own in rows.values() for row in own for name in row.model_extra or ()})
    if unused:
        yield f"{folder}: fields that are not used: {', '.join(unused)}"
    shown = len(_standing_in(rows["train"], rows["validation"]))
    if shown:
        yield f"{folder}: {shown} rows of validation.jsonl stand in train.jsonl: its loss is not that of unseen rows"
    twice = len(rows["test"]) - len({_keys(row)[0] for row in rows["test"]})
    if twice:
        yield f"{folder}: {twice} rows of test.jsonl repeat an earlier one and count again"


@cache
def _check(folder: str, hashes: tuple[str, ...]) -> None:
    """Once for the same content."""
    train, _, test = (_rows(_file(folder, split), scored=split == "test") for split in SPLITS)
    shared = _standing_in(train, test)
    if shared:
        number, other = shared[0]
        more = f", and {len(shared) - 1} more rows" if len(shared) > 1 else ""
        where = f"stands in line {other} of train.jsonl{more}"
        _refuse(_file(folder, "test"), number, "prompt", f"{where}: take it out of one of them")


def _standing_in(train: list[Row], others: list[Row]) -> list[tuple[int, int]]:
    """Line numbers of rows that were trained on, and of the row that did: same prompt and answer, whatever the spaces
    and however a letter's accents are written.

    Where an answer is generated the prompt alone is the question.
    """
    seen: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(train, start=1):
        for key in _keys(row):
            seen.setdefault(key, number)
    found = []
    for number, row in enumerate(others, start=1):
        known = [seen[key] for key in _keys(row) if key in seen]
        if known:
            found.append((number, min(known)))
    return found


def _keys(row: Row) -> list[tuple[str, ...]]:
    prompt, target = _plain(row.prompt), _plain(row.target)
    return [(prompt, target)] if row.choices else [(prompt, target), (prompt,)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _file(folder: str, split: str) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(
            f"data.path={folder} is not a folder: name one with train, validation and test.jsonl"
        )
    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        raise ValueError(f"data.path: {path} {what} ({FORM})")
    return path


def _rows(path: Path, scored: bool) -> list[Row]:
    """All rows of a file. `scored`: those whose answer is generated must be able to get it right."""
    rows = [_row(path, number, line) for number, line in enumerate(_lines(path), start=1)]
    for number, row in enumerate(rows, start=1):
        if (row.choices is None) != (rows[0].choices is None):
            _refuse(
                path, number, "choices", f"{_has(row)}, and line 1 {_has(rows[0])}: give each kind a folder"
            )
        if scored and row.choices is None and END in str(row.answer):
            _refuse(path, number, "answer", "has a line break, at which generation stops: write one line")
    return rows


def _lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty: give it at least one row ({FORM})")
    return lines


def _has(row: Row) -> str:
    return "has none" if row.choices is None else "has some"


def _row(path: Path, number: int, line: bytes) -> Row:
    row = _valid(Row, path, number, line)
    wrong = _misspelt(row) or _contradiction(row)
    if wrong:
        _refuse(path, number, *wrong)
    return row


def _valid(form: type[Form], path: Path, number: int, line: bytes) -> Form:
    if len(line) > MOST_BYTES:
        _refuse(path, number, None, f"has {len(line)} bytes, and a row may have {MOST_BYTES}: shorten it")
    try:
        return form.model_validate(_parsed(line))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _refuse(path, number, _place(first["loc"]), _reason(first))
    except UnicodeDecodeError as error:
        _refuse(path, number, None, f"byte {error.start} is not UTF-8: save the file as UTF-8")
    except RecursionError:
        _refuse(path, number, None, f"is nested too deep: {FORM}")
    except ValueError as error:
        _refuse(path, number, None, f"{error}; {FORM}")


def _parsed(line: bytes) -> Any:
    if not line.strip():
        raise ValueError("is blank")
    return json.loads(line.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _misspelt(row: Row) -> tuple[str, str] | None:
    for name in row.model_extra or ():
        meant = difflib.get_close_matches(name.lower(), Row.model_fields, n=1, cutoff=0.8)
        if meant:
            return _shortened(name), f"is no field: write {meant[0]}"
    return None


def _contradiction(row: Row) -> tuple[str, str] | None:
    """The field that does not go with the others, and why."""
    choices, label = row.choices, row.label
    if choices is None:
        if label is not None:
            return "label", "stands without choices"
        return ("answer", "is missing, and so are choices") if row.answer is None else None
    if len(choices) < 2:
        return "choices", f"has {len(choices)}: give at least two"
    if len(set(map(_plain, choices))) < len(choices):
        return "choices", "has two that are the same"
    if label is None:
        return "label", f"is missing: the place of the right choice, 0 to {len(choices) - 1}"
    if not 0 <= label < len(choices):
        return "label", f"is {_shown(label)}: the place of the right choice, 0 to {len(choices) - 1}"
    if row.answer not in (None, choices[label]):
        return "answer", f"is not the choice that label={label} names"
    return None


def _place(loc: tuple[int | str, ...]) -> str | None:
    """choices, 1 -> choices[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in loc) or None


def _reason(error: Any) -> str:
    if error["type"] == "missing":
        return f"is missing: {FORM}"
    if error["type"] == "model_type":
        return f"is no object: {FORM}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg'].removeprefix('Input ')}, and is {_shown(error['input'])}"


def _shown(value: Any) -> str:
    # a value may be nested nearly as deep as Python goes
    return _shortened(reprlib.repr(value) if isinstance(value, (list, dict)) else json.dumps(value))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _refuse(path: Path, number: int, field: str | None, reason: str) -> NoReturn:
    where = f"{path}, line {number}" if field is None else f"{path}, line {number}, {field}"
    raise ValueError(printable(f"{where}: {reason}"))
