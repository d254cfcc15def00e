"""One cut between prompt and answer, for training and for lm-eval, whatever a tokenizer merges, appends or lacks."""

from __future__ import annotations

from functools import cache

import pytest
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adafuse.data import tokens
from adafuse.data.families import NAMES, Item, generate
from adafuse.evaluation.adapted_lm import AdaptedLM
from synthetic.tokenizers import KINDS, bpe, words, wrapped

LIMIT = 256
OWN = [
    Item("Is it blue? Answer: ", "yes"),
    Item("Is it blue? Answer:", " yes"),
    Item("Is it blue? Answer: ", "yes", ["yes", "no"], 0),
    Item("2+2=", "4", ["4", "5", " 6", "44"], 0),
    Item("é", "été", ["été", "é"], 0),
    Item("line\n", "next"),
]

tokenizer_of = cache(lambda kind: KINDS[kind]())


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tokenizer_of(request.param)


def every_item() -> list[Item]:
    return [item for name in NAMES for item in generate(name, "test", 40, 0)] + OWN


def lm_of(tokenizer: PreTrainedTokenizerFast) -> AdaptedLM:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LIMIT, **shape))
    return AdaptedLM(model.eval(), tokenizer, None, 4, merging=False)


def learnt(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != tokens.IGNORED]


def context(row: dict[str, list[int]]) -> list[int]:
    return row["input_ids"][: len(row["input_ids"]) - len(learnt(row))]


def test_what_is_learnt_writes_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    items = every_item()
    for item, row in zip(items, tokens.training_rows(items, tokenizer, LIMIT).rows, strict=True):
        text = tokens.written([learnt(row)], tokenizer)[0]
        assert context(row) and row["input_ids"][-len(learnt(row)) :] == learnt(row)
        if item.choices:
            # it may begin before the answer, where a token holds both
            assert text.endswith(item.answer) and (item.prompt + item.answer).endswith(text)
        else:
            assert text == item.answer + "\n"


def test_a_choice_is_learnt_as_the_joint_encoding_has_it(tokenizer: PreTrainedTokenizerFast) -> None:
    """By the offsets of the tokenizer: every token with a character of the answer, in the context no such token."""
    items = [Item(item.prompt, item.answer, [item.answer] * 2, 0) for item in every_item() if item.choices]
    for item, row in zip(items, tokens.training_rows(items, tokenizer, LIMIT).rows, strict=True):
        found = tokenizer(item.prompt + item.answer, return_offsets_mapping=True)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        assert learnt(row) == [token for token, (_, end) in pairs if end > len(item.prompt)]


def test_lm_eval_scores_the_tokens_that_are_learnt(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, lm = [item for item in every_item() if item.choices], lm_of(tokenizer)
    asked = [(i, choice) for i, item in enumerate(items) for choice in item.choices]
    requests = [
        Instance("loglikelihood", {}, (items[i].prompt, choice), 0, ("own", i, 1)) for i, choice in asked
    ]
    seen = []

    def score(encoded, **_):
        seen.extend(encoded)
        return [(0.0, False)] * len(encoded)

    monkeypatch.setattr(lm, "_loglikelihood_tokens", score)
    lm.loglikelihood(requests)
    rows = tokens.training_rows(items, tokenizer, LIMIT).rows
    scored = {(i, choice): own[1:] for (i, choice), own in zip(asked, seen, strict=True)}
    for i, (item, row) in enumerate(zip(items, rows, strict=True)):
        assert scored[i, item.answer] == (context(row), learnt(row))


def test_choices_of_an_item_are_scored_over_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Else a choice whose first token holds the prompt's end pays for characters that others get for nothing."""
    items = [item for item in every_item() if item.choices]
    for item, cuts in zip(
        items, tokens.cut_choices([(i.prompt, i.choices) for i in items], tokenizer), strict=True
    ):
        starts = set()
        for cut, choice in zip(cuts, item.choices, strict=True):
            rest = tokens.written([cut.ids[cut.first :]], tokenizer)[0]
            assert rest.endswith(choice)
            starts.add(len(rest) - len(choice))
        assert len(starts) == 1


def test_generation_starts_from_the_tokens_that_training_showed(tokenizer: PreTrainedTokenizerFast) -> None:
    items, lm = [item for item in every_item() if not item.choices], lm_of(tokenizer)
    rows = tokens.training_rows(items, tokenizer, LIMIT).rows
    for item, row in zip(items, rows, strict=True):
        ids, mask = lm.tok_batch_encode([item.prompt, item.prompt + " and a longer one"])
        assert ids[0][mask[0].bool()].tolist() == context(row) == lm.tok_encode(item.prompt)


def test_what_is_generated_is_read_with_its_first_space(tokenizer: PreTrainedTokenizerFast) -> None:
    lm = lm_of(tokenizer)
    row = tokens.training_rows([Item("Is it blue? Answer:", " yes")], tokenizer, LIMIT).rows[0]
    assert lm.tok_decode(learnt(row)) == " yes\n"


def test_merges_over_the_border_are_counted() -> None:
    items = [Item("Is it blue? Answer: ", "yes"), Item("Is it blue? Answer: ", "yes", ["yes", "no"], 0)]
    said = tokens.training_rows(items, wrapped(words()), LIMIT).said
    assert (said.rows, said.mended, said.merged, said.unwritten) == (2, 1, 1, 0)
    assert said.label_tokens == 4 and "1 whose answer is encoded by itself" in str(said)
    assert "labels;" in str(said) and f"{said.tokens} tokens" in str(said)


def test_a_context_that_is_merged_away_is_the_token_that_begins_a_text() -> None:
    tokenizer = wrapped(bpe())
    cut = tokens.cut_choices([("Is it blue? Answer: ", ["yes", "no"])], tokenizer)[0][0]
    assert cut.ids[: cut.first] == [tokenizer.bos_token_id]
    nameless = PreTrainedTokenizerFast(tokenizer_object=bpe())
    with pytest.raises(ValueError, match="has no bos_token to stand before it"):
        tokens.cut_choices([("Is it blue? Answer: ", ["yes", "no"])], nameless)


def test_a_prompt_that_begins_with_the_token_itself_does_not_begin_twice() -> None:
    tokenizer = tokenizer_of("appends its end")
    ids = tokens.prompts(["<s>2+2="], tokenizer)[0]
    assert ids == tokens.prompts(["2+2="], tokenizer)[0] and ids.count(tokenizer.bos_token_id) == 1


def test_an_answer_ends_with_the_end_token_where_no_line_break_can_be_written() -> None:
    letters = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdef="])}
    model = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    model.decoder = decoders.Fuse()
    tokenizer = wrapped(model)
    items = [Item("ab=", "ba"), Item("ab=", "Ω"), Item("ab=", "é", ["é", "a"], 0)]
    encoded = tokens.training_rows(items, tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(learnt(encoded.rows[0])) == ["b", "a", "</s>"]
    assert encoded.said.unwritten == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no answer can end"):
        tokens.training_rows([Item("ab=", "ba")], tokenizer, 16)


@pytest.mark.parametrize(
    ("limit", "text", "labels", "counts"),
    [
        (11, "abcdefghxy\n", 3, (0, 0)),
        (5, "ghxy\n", 3, (1, 0)),
        (4, "ghxy", 2, (1, 1)),
        (2, "hx", 1, (1, 1)),
    ],
)
def test_a_long_row_keeps_the_end_of_its_prompt(
    limit: int, text: str, labels: int, counts: tuple[int, int]
) -> None:
    tokenizer = tokenizer_of("bytes")
    encoded = tokens.training_rows([Item("abcdefgh", "xy")], tokenizer, limit)
    assert tokenizer.decode(encoded.rows[0]["input_ids"]) == text and len(learnt(encoded.rows[0])) == labels
    assert (encoded.said.prompts_cut, encoded.said.answers_cut) == counts


def test_what_cannot_be_cut_is_refused_in_one_line() -> None:
    tokenizer = tokenizer_of("bytes")
    for items, reason in (
        ([Item("", "a")], "no token for the prompt"),
        ([Item("a", "", ["", "b"], 0)], "no token for ''"),
    ):
        with pytest.raises(ValueError, match=reason):
            tokens.training_rows(items, tokenizer, LIMIT)
    with pytest.raises(ValueError, match="leaves no room"):
        tokens.training_rows([Item("a", "b")], tokenizer, 1)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not say which characters"):
        tokens.prompts(["a"], Slow())
