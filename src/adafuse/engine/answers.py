"""Prompts as people have them, and their continuations: texts, chats or ids in; texts, pieces of one, or ids out.

In: a decoder (decoders.py) whose adapter is in the model, and prompts. Out: the ids of every row, token after token,
until all rows have ended. Prompts become tokens as they do in training and evaluation (data/tokens.py). Next: api.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adafuse.data import tokens
from adafuse.engine.decoders import Decoder
from adafuse.model.checkpoint import one_line

FORMS = "a text, a list of texts, a chat (a list of {'role', 'content'}), a list of chats, or ids [B, S]"
# what a tokenizer writes for half of a character
HALF = "\N{REPLACEMENT CHARACTER}"
# of generation_config.json, by what transformers takes another token than the likeliest, and what leaves it alone
SHAPING: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"), 1),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0
    ),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
}


@dataclass(frozen=True)
class Prompts:
    """Ids [B, S] and their mask, padding on the left; None where there is none. `form`: text, texts or ids."""

    ids_BS: Tensor
    mask_BS: Tensor | None
    form: str


@dataclass(frozen=True)
class Ending:
    """When a row is over: at one of these ids, or when its text holds one of `stop`."""

    ids: frozenset[int]
    stop: tuple[str, ...]
    tokenizer: Any

    def is_over(self, row: Sequence[int]) -> bool:
        if row[-1] in self.ids or not self.stop:
            return row[-1] in self.ids
        # a token carries a byte or more, so a text that was just completed lies within these
        last = list(row[-max(len(text.encode()) for text in self.stop) :])
        written = tokens.written([last], self.tokenizer)[0]
        return any(text in written for text in self.stop)

    def text(self, row: Sequence[int]) -> str:
        """What was written before the end."""
        found = tokens.written([list(row)], self.tokenizer)[0]
        cuts = [found.find(text) for text in self.stop if text in found]
        return found[: min(cuts)] if cuts else found


def read(inputs: Any, tokenizer: Any, model: nn.Module, padding: int) -> Prompts:
    """Prompts of any form. Raises ValueError, one line, for what is none."""
    device = model.device
    if isinstance(inputs, Tensor | Mapping):
        return _of_ids(inputs, model.get_input_embeddings().num_embeddings, device)
    if tokenizer is None:
        raise ValueError(
            "this model came without a tokenizer, so texts need one: pass tokenizer= when loading, or give ids"
        )
    if isinstance(inputs, str):
        rows, form = tokens.prompts([inputs], tokenizer), "text"
    elif not isinstance(inputs, Sequence) or not inputs:
        raise ValueError(f"{inputs!r:.60} is no prompt: give {FORMS}")
    elif all(isinstance(one, str) for one in inputs):
        rows, form = tokens.prompts(inputs, tokenizer), "texts"
    elif all(isinstance(one, Mapping) for one in inputs):
        rows, form = [_of_chat(inputs, tokenizer)], "text"
    elif all(isinstance(one, Sequence) and one and isinstance(one[0], Mapping) for one in inputs):
        rows, form = [_of_chat(one, tokenizer) for one in inputs], "texts"
    else:
        raise ValueError(f"{inputs!r:.60} is no prompt: give {FORMS}")
    if not all(rows):
        raise ValueError(f"prompt {rows.index([])} has no token: the tokenizer adds none to an empty text")
    return _padded(rows, form, device, padding)


def end_of(model: nn.Module, tokenizer: Any, stop: str | Sequence[str] | None) -> Ending:
    """The model's own end tokens, or the tokenizer's where it names none, and the texts in `stop`.

    Raises ValueError for a text that is empty.
    """
    several = isinstance(stop, Sequence) and not isinstance(stop, str)
    texts: tuple[Any, ...] = () if stop is None else tuple(stop) if several else (stop,)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop={stop!r} must be a text, or texts, that are not empty")
    if texts and tokenizer is None:
        raise ValueError("stop texts need a tokenizer: pass tokenizer= when loading")
    own = getattr(model.generation_config, "eos_token_id", None)
    own = getattr(tokenizer, "eos_token_id", None) if own is None else own
    ids = own if isinstance(own, (list, tuple)) else [own]
    return Ending(frozenset(one for one in ids if one is not None), texts, tokenizer)


def warn_unapplied(settings: Any) -> None:
    """Warn of what transformers' own generate would apply to logits, and this one does not."""
    found = {name: getattr(settings, name, None) for name in SHAPING}
    unapplied = [f"{name}={v}" for name, v in found.items() if v is not None and v != SHAPING[name]]
    if unapplied:
        warnings.warn(
            f"generation_config has {', '.join(unapplied)}, which this generate leaves alone: it takes the likeliest "
            "token, or draws; transformers' own (input_ids=) applies it",
            stacklevel=3,
        )


def chooser(temperature: float, top_p: float, seed: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From logits [B, V] to the next ids [B, 1]: the largest at a temperature of 0, else drawn, alike for a seed."""
    number = isinstance(temperature, int | float) and (temperature == 0 or 1e-6 <= temperature < float("inf"))
    if not number:  # below, a difference of two logits is no number any more
        raise ValueError(f"temperature={temperature!r} must be 0 (the likeliest token), or 1e-6 and more")
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be above 0 and at most 1")
    if not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be a whole number: the same one draws the same text")
    if temperature == 0 and top_p < 1:
        raise ValueError(f"top_p={top_p!r} is for drawing: set a temperature above 0, or leave it out")
    if temperature == 0:
        return lambda logits_BV: logits_BV.argmax(-1, keepdim=True)
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(logits_BV: Tensor) -> Tensor:
        sorted_BV, ids_BV = (logits_BV.float() / temperature).softmax(-1).sort(-1, descending=True)
        # the likeliest whose sum reaches top_p; the first always
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        place_B1 = torch.multinomial(sorted_BV.masked_fill(outside_BV, 0.0), 1, generator=generator)
        return ids_BV.gather(-1, place_B1)

    return drawn


def continued(
    decoder: Decoder, prompts: Prompts, most: int, choose: Callable[[Tensor], Tensor], ending: Ending
) -> Iterator[list[list[int]]]:
    """The new ids of every row after each token; a row that is over gets no more. Ends with the last row."""
    rows: list[list[int]] = [[] for _ in prompts.ids_BS]
    going = set(range(len(rows)))
    logits_BV = decoder.start(prompts.ids_BS, prompts.mask_BS)
    with decoder.decoding():
        for step in range(1, most + 1):
            token_B1 = choose(logits_BV)
            for number, (token,) in enumerate(token_B1.tolist()):
                if number in going:
                    rows[number].append(token)
                    if ending.is_over(rows[number]):
                        going.discard(number)
            yield rows
            if not going or step == most:
                return
            logits_BV = decoder.step(token_B1)


def pieces(rows: Iterator[list[list[int]]], ending: Ending) -> Iterator[str]:
    """The text of the one row as it grows; what may be the beginning of a stop text, or half a character, waits."""
    said, row = "", list[int]()
    for (row,) in rows:
        text = ending.text(row)
        sure = text[: len(text) - (0 if ending.is_over(row) else _open(text, ending.stop))]
        if len(sure) > len(said) and not sure.endswith(HALF):
            yield sure[len(said) :]
            said = sure
    if rest := ending.text(row)[len(said) :]:
        yield rest


def _open(text: str, stop: Collection[str]) -> int:
    """How many characters at the end may be the beginning of a stop text."""
    starts = {one[:length] for one in stop for length in range(1, len(one))}
    return max((len(start) for start in starts if text.endswith(start)), default=0)


def whole(prompts: Prompts, rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Prompts and their continuations, [B, S + n], as transformers gives them: `padding` behind a row that is over."""
    longest = max(map(len, rows))
    new = [[*row, *[padding] * (longest - len(row))] for row in rows]
    return torch.cat([prompts.ids_BS, torch.tensor(new, device=prompts.ids_BS.device)], dim=1)


def _of_ids(inputs: Any, words: int, device: torch.device) -> Prompts:
    if not isinstance(inputs, Tensor) and "input_ids" not in inputs:
        raise ValueError(f"{inputs!r:.60} has no input_ids: give what the tokenizer returns, or {FORMS}")
    ids, mask = (
        (inputs, None) if isinstance(inputs, Tensor) else (inputs["input_ids"], inputs.get("attention_mask"))
    )
    ids_BS = torch.as_tensor(ids)
    if ids_BS.ndim != 2 or ids_BS.is_floating_point() or not ids_BS.numel():
        raise ValueError(
            f"ids of shape {list(ids_BS.shape)} and type {ids_BS.dtype} are no prompts: give whole numbers [B, S]"
        )
    if not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < words:
        raise ValueError(f"ids must lie from 0 to {words - 1}, as many as the embedding has rows")
    mask_BS = None if mask is None else torch.as_tensor(mask)
    if mask_BS is not None and (mask_BS.shape != ids_BS.shape or not bool(mask_BS[:, -1].all())):
        raise ValueError(
            "attention_mask must have the shape of the ids, and padding stands on the left: padding_side='left'"
        )
    return Prompts(ids_BS.to(device), _or_none(mask_BS, device), "ids")


def _of_chat(messages: Any, tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: give the prompt as one text")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template does, or says of a chat that it does not take
        raise ValueError(f"the chat template does not take this chat: {one_line(error)}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _padded(rows: list[list[int]], form: str, device: torch.device, padding: int) -> Prompts:
    longest = max(map(len, rows))
    ids_BS = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return Prompts(ids_BS, _or_none(mask_BS, device), form)


def _or_none(mask_BS: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask_BS is None or bool(mask_BS.all()) else mask_BS.to(device)
