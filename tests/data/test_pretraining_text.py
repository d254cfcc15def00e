"""The backbone's text: seeded, both kinds by turns, nothing of the splits it is judged by."""

import torch

from adafuse.data import standard_library
from adafuse.data.pretraining_text import Blocks, held_out_tokens, pretraining_tokens
from adafuse.model.backbone import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_pretraining_tokens_are_seeded_and_hold_both_kinds_of_text() -> None:
    tokens = pretraining_tokens(TOKENIZER, 5000, seed=0)
    assert tokens.shape == (5000,) and tokens.dtype == torch.int64
    assert tokens.equal(pretraining_tokens(TOKENIZER, 5000, seed=0))
    assert not tokens.equal(pretraining_tokens(TOKENIZER, 5000, seed=1))
    text = TOKENIZER.decode(tokens)
    assert " backwards: " in text and "    " in text and TOKENIZER.unk_token not in text


def test_held_out_text_and_lessons_are_of_their_own_split() -> None:
    found = {name: TOKENIZER.decode(ids) for name, ids in held_out_tokens(TOKENIZER, 20_000, seed=0).items()}
    assert set(found) == {"text", "lessons"}
    pieces = [found["text"][start : start + 201] for start in range(0, 20_000 - 201, 201)]
    held_out = standard_library.text("validation")
    assert all(piece.removesuffix("\n") in held_out for piece in pieces)
    trained = set(TOKENIZER.decode(pretraining_tokens(TOKENIZER, 200_000, 0)).splitlines())
    copied = [line for line in found["lessons"].splitlines() if " again: " in line]
    assert copied and not set(copied) & trained


def test_blocks_are_rows_for_the_trainer() -> None:
    blocks = Blocks(torch.arange(12).view(3, 4))
    assert len(blocks) == 3
    assert blocks[1] == {
        "input_ids": [4, 5, 6, 7],
        "labels": [4, 5, 6, 7],
        "attention_mask": [1, 1, 1, 1],
    }
