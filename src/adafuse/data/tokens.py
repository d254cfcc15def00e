"""Where a prompt ends and its answer begins, in tokens: one cut for training and for lm-eval.

In: items and a fast tokenizer. Out: token ids and the first that is learnt and scored. A tokenizer may merge characters
of the prompt with characters of the answer, so lengths of separate encodings say nothing; offsets of the joint one do.
- Choices are encoded with their prompt, and all choices of an item are cut at the same character: the last at which no
  token spans both sides in any of them. Else one would pay for characters of the prompt that another gets for nothing.
- A generated answer follows the tokens that generation starts from, which cannot know what comes. Where the joint
  encoding merges across them, the answer is encoded by itself, and counted as mended.
Letters: `ends` are the characters of the text after each token. Next: items.py, evaluation/adapted_lm.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, takewhile
from typing import Any

from adafuse.data.families import Item

# Where evaluation stops generating, so training must teach it.
END = "\n"
# Texts that an answer may follow without being merged with; before all of them nothing.
LEADS = ("", ":", "a", "0", ".", "\n")
# What a continuation follows when it is decoded: decoders drop a space at the very beginning of a text.
ANCHOR = "a"
IGNORED = -100


@dataclass(frozen=True)
class Cut:
    """Token ids of a prompt and what follows; `ids[first:]` is what is learnt or scored, and `first` is at least 1.

    `merged`: the first of them holds characters of the prompt too. `mended`: see above.
    """

    ids: list[int]
    first: int
    merged: bool = False
    mended: bool = False


@dataclass
class Said:
    """What became of rows as tokens. `prompts_cut` lost their beginning to a limit, `answers_cut` their end as well;
    `unwritten` answers hold what the tokenizer cannot write, so that no generation is right."""

    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    merged: int = 0
    mended: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    unwritten: int = 0

    @property
    def lost(self) -> bool:
        """Whether some rows teach less than they say."""
        return bool(self.prompts_cut or self.answers_cut or self.unwritten)

    def __str__(self) -> str:
        share = f"{self.label_tokens / max(1, self.tokens):.1%}"
        rare = {
            "merged": "with a token that holds prompt and answer",
            "mended": "whose answer is encoded by itself, as it is generated",
            "prompts_cut": "whose prompt lost its beginning to the limit of tokens",
            "answers_cut": "whose answer lost its end to it",
            "unwritten": "whose answer the tokenizer cannot write",
        }
        counts = asdict(self)
        odd = "".join(f"; {counts[name]} {what}" for name, what in rare.items() if counts[name])
        return f"{self.rows} rows, {self.tokens} tokens, {share} of them labels{odd}"


@dataclass
class Encoded:
    """Training rows {input_ids, labels}, labels -100 on the prompt, and what was done to them."""

    rows: list[dict[str, list[int]]]
    said: Said


def training_rows(items: Sequence[Item], tokenizer: Any, max_length: int) -> Encoded:
    """Items as they are learnt. Raises ValueError for one that cannot be cut, with its text."""
    if max_length < 2:
        raise ValueError(
            f"train.max_length={max_length} leaves no room for a prompt and its answer: raise it"
        )
    cuts = _right_choices(items, tokenizer) | cut_answers(items, tokenizer)
    said, rows = Said(), []
    for i in range(len(items)):
        cut = cuts[i]
        ids, labels = _within(cut, max_length)
        rows.append({"input_ids": ids, "labels": labels})
        labelled = sum(label != IGNORED for label in labels)
        said.tokens, said.label_tokens = said.tokens + len(ids), said.label_tokens + labelled
        said.merged, said.mended = said.merged + cut.merged, said.mended + cut.mended
        said.prompts_cut += len(ids) - labelled < cut.first
        said.answers_cut += labelled < len(cut.ids) - cut.first
    said.rows = len(rows)
    said.unwritten = unwritten(items, cuts, tokenizer)
    return Encoded(rows, said)


def cut_choices(groups: Sequence[tuple[str, list[str]]], tokenizer: Any) -> list[list[Cut]]:
    """Each prompt with each of its continuations. Raises ValueError for a continuation without a token of its own."""
    texts = [prompt + continuation for prompt, continuations in groups for continuation in continuations]
    encoded = iter(_encode(texts, tokenizer))
    found = []
    for prompt, continuations in groups:
        together = [next(encoded) for _ in continuations]
        at = _common_cut(len(prompt), [ends for _, ends in together])
        group = [Cut(ids, bisect_right(ends, at), at < len(prompt)) for ids, ends in together]
        for cut, continuation in zip(group, continuations, strict=True):
            if cut.first == len(cut.ids):
                raise ValueError(f"the tokenizer has no token for {continuation!r} after {prompt[-40:]!r}")
        found.append([_with_context(cut, tokenizer) for cut in group])
    return found


def prompts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The ids that generation starts from: without a token that the tokenizer appends to end a text."""
    return [ids for ids, _ in _encode(texts, tokenizer)]


def written(continuations: Sequence[list[int]], tokenizer: Any) -> list[str]:
    """The texts of ids that continue a prompt, a space at their beginning included."""
    anchor = prompts([ANCHOR], tokenizer)[0]
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = tokenizer.batch_decode([anchor, *([*anchor, *ids] for ids in continuations)], **how)
    return [text[len(texts[0]) :] for text in texts[1:]]


def unwritten(items: Sequence[Item], cuts: Mapping[int, Cut], tokenizer: Any) -> int:
    """How many of the items, cut by their places, have an answer that the tokenizer cannot write."""
    texts = written([cuts[i].ids[cuts[i].first :] for i in range(len(items))], tokenizer)
    return sum(not _is_written(*pair) for pair in zip(items, texts, strict=True))


def _right_choices(items: Sequence[Item], tokenizer: Any) -> dict[int, Cut]:
    chosen = {i: item for i, item in enumerate(items) if item.choices}
    groups = [(item.prompt, list(item.choices or ())) for item in chosen.values()]
    cuts = cut_choices(groups, tokenizer)
    return {i: group[item.label or 0] for (i, item), group in zip(chosen.items(), cuts, strict=True)}


def cut_answers(items: Sequence[Item], tokenizer: Any) -> dict[int, Cut]:
    """Each item without choices, by its place, as it is generated. Raises ValueError for one without a token."""
    asked = {i: item for i, item in enumerate(items) if not item.choices}
    if not asked:
        return {}
    end, end_ids = _ending(tokenizer)
    before = prompts([item.prompt for item in asked.values()], tokenizer)
    joint = prompts([item.prompt + item.answer + end for item in asked.values()], tokenizer)
    found = {}
    for (i, item), start, whole in zip(asked.items(), before, joint, strict=True):
        if not start:
            raise ValueError(f"the tokenizer has no token for the prompt {item.prompt[:40]!r}")
        mended = whole[: len(start)] != start
        ids = start + _alone(item.answer + end, tokenizer) if mended else whole
        if len(ids) == len(start):
            raise ValueError(f"the tokenizer has no token for the answer {item.answer[:40]!r}")
        found[i] = Cut(ids + end_ids, len(start), mended=mended)
    return found


def _ending(tokenizer: Any) -> tuple[str, list[int]]:
    """What teaches an answer's end: a line break, or the end token where the tokenizer cannot write one."""
    if written(prompts([ANCHOR + END], tokenizer), tokenizer)[0].endswith(END):
        return END, []
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer writes no line break and has no end token, so no answer can end: name an eos_token in "
            "tokenizer_config.json"
        )
    return "", [tokenizer.eos_token_id]


def _alone(text: str, tokenizer: Any) -> list[int]:
    """Tokens that write `text` and nothing more after any prompt; its plain encoding if none do."""
    found = []
    for lead in LEADS:
        ids, ends = _encode([lead + text], tokenizer, special=False)[0]
        first = bisect_right(ends, len(lead))
        if _start(ends, first) == len(lead):
            found.append(ids[first:])
            if written(found[-1:], tokenizer)[0] == text:
                return found[-1]
    return found[0]


def _is_written(item: Item, text: str) -> bool:
    """Whether the tokens of an item's answer write it; those of a choice may begin before it."""
    return text.endswith(item.answer) if item.choices else text.removesuffix(END) == item.answer


def _within(cut: Cut, limit: int) -> tuple[list[int], list[int]]:
    """At most `limit` ids, and their labels: the end of a long prompt, and of a long answer what half of them hold."""
    kept = min(cut.first, max(limit - (len(cut.ids) - cut.first), limit // 2, 1))
    ids = cut.ids[cut.first - kept :][:limit]
    return ids, [IGNORED] * kept + ids[kept:]


def _common_cut(at: int, ends_of: list[list[int]]) -> int:
    """The last character up to `at` where every one of the encodings has a border between tokens."""
    while True:
        starts = [_start(ends, bisect_right(ends, at)) for ends in ends_of]
        if min(starts) >= at:
            return at
        at = min(starts)


def _start(ends: list[int], token: int) -> int:
    return ends[token - 1] if token else 0


def _with_context(cut: Cut, tokenizer: Any) -> Cut:
    """With the token that stands for an empty context where there is none: a first token is never predicted."""
    if cut.first:
        return cut
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ValueError(
            "the tokenizer merges a whole prompt into the first token of an answer and has no bos_token to stand "
            "before it: name one in tokenizer_config.json"
        )
    return Cut([token, *cut.ids], 1, cut.merged)


def _encode(texts: Sequence[str], tokenizer: Any, special: bool = True) -> list[tuple[list[int], list[int]]]:
    """Ids and ends of each text; no token that the tokenizer appends, and no second one that begins a text."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token holds: save its fast form, "
            "tokenizer.json, into the folder"
        )
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    columns = zip(
        texts, found["input_ids"], found["offset_mapping"], found["special_tokens_mask"], strict=True
    )
    return [_own_tokens(text, ids, offsets, added, tokenizer) for text, ids, offsets, added in columns]


def _own_tokens(
    text: str, ids: list[int], offsets: list[tuple[int, int]], added: list[int], tokenizer: Any
) -> tuple[list[int], list[int]]:
    stop = len(ids) - len(list(takewhile(bool, reversed(added))))
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    start = len(list(takewhile(bool, added[:stop]))) if begun else 0
    ends = accumulate((end for _, end in offsets[start:stop]), max)
    return ids[start:stop], list(ends)
