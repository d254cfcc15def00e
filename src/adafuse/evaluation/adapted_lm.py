"""The model as lm-eval sees it: its requests go through the forward and the decode loop that are also timed.

In: a backbone, its tokenizer and an installed `Adapter` or None. Out: logits and greedy continuations for lm-eval.
Log-likelihoods are whole sequences, hence unmerged; generation decodes with the strategy under test. Texts become
tokens as they do in training (data/tokens.py), and a number that is not finite is an error, never a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from adafuse.adapters.adapter import Adapter
from adafuse.data import tokens
from adafuse.engine import decode
from adafuse.evaluation.suites import LOCAL_TASKS
from adafuse.model import finite
from adafuse.model.declared import positions

NO_USE = "logits are not finite, or all the same because activations overflow"


class AdaptedLM(HFLM):
    """HFLM whose two calls into the model are ours, and the way from text to tokens and back.

    `shortened` prompts lost their beginning: with their answer they were longer than the model's positions.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Adapter | None,
        batch: int | str,
        merging: bool,
        own: str | None = None,
    ) -> None:
        """`own` is the folder of the user's own items, which messages name."""
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            max_length=positions(model.config.to_dict()),
            trust_remote_code=False,
        )
        self.adapter = adapter
        self.generation_batch = 1 if merging else batch
        self.shortened = 0
        self._useless: list[Tensor] = []
        self.own = own

    def take_share(self, accelerator: Accelerator | None) -> None:
        """Answer this process's part of the items, as lm-eval spreads them; None is a process that is alone."""
        if accelerator is not None:
            self.accelerator, self._device = accelerator, accelerator.device
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM, but cut as training cuts. Raises ValueError for a continuation that is longer than the model's
        positions, or whose value is not finite.
        """
        encoded = []
        for request, cut in zip(requests, self._cuts(requests), strict=True):
            if len(cut.ids) - cut.first > self.max_length:
                raise ValueError(
                    f"{self._named(request)}: {request.args[1][:40]!r} has {len(cut.ids) - cut.first} tokens and the "
                    f"model {self.max_length} positions"
                )
            self.shortened += len(cut.ids) > self.max_length + 1
            encoded.append((request.args, cut.ids[: cut.first], cut.ids[cut.first :]))
        self._useless.clear()
        found = self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)
        for request, (value, _) in zip(requests, found, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"{self._named(request)}: the log-likelihood of {request.args[1][:40]!r} is {value}"
                )
        if any(map(bool, self._useless)):
            raise ValueError(f"{self._named(requests[0])} or one after it: {NO_USE}")
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM, but one sequence at a time where the strategy merges: weights hold one selection."""
        longest = max((request.args[1].get("max_gen_toks", 0) for request in requests), default=0)
        if longest >= self.max_length:
            raise ValueError(
                f"a task generates up to {longest} tokens, and the model has {self.max_length} positions for them and "
                "the prompt: leave it out"
            )
        batch, self.batch_size_per_gpu = self.batch_size, self.generation_batch
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The ids that a prompt has in training."""
        if add_special_tokens is None:
            return tokens.prompts([string], self.tokenizer)[0]
        return super().tok_encode(string, add_special_tokens, **options)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """Those ids [B, S] of several, padded on the left, and their mask. Any id is a padding: no one sees it."""
        rows = [ids or [self.prefix_token_id] for ids in tokens.prompts(strings, self.tokenizer)]
        kept = [ids[-left_truncate_len:] if left_truncate_len else ids for ids in rows]
        self.shortened += sum(len(short) < len(ids) for short, ids in zip(kept, rows, strict=True))
        longest = max(map(len, kept))
        padded = [[0] * (longest - len(ids)) + ids for ids in kept]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in kept]
        return torch.tensor(padded), torch.tensor(mask)

    def tok_decode(self, ids: Any, skip_special_tokens: bool = True) -> Any:
        """The text of a continuation; of one id as HFLM has it, and of none none: not every tokenizer has an end."""
        if isinstance(ids, list):
            return tokens.written([ids], self.tokenizer)[0]
        return None if ids is None else super().tok_decode(ids, skip_special_tokens)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """As HFLM, without the token that begins a text where the tokenizer will put one there itself."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        begin = self.tokenizer.bos_token_id
        begins = begin is not None and tokens.prompts(["a"], self.tokenizer)[0][:1] == [begin]
        return text.removeprefix(self.tokenizer.bos_token) if begins else text

    def say_shortened(self) -> None:
        """Say on the screen what a score has lost, if anything."""
        if self.shortened:
            print(
                f"evaluate: {self.shortened} prompts lost their beginning to the model's {self.max_length} positions"
            )

    def _cuts(self, requests: list[Instance]) -> list[tokens.Cut]:
        """The choices of an item together, in the order of the requests."""
        places: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(place)
        groups = [(key[-1], [requests[i].args[1] for i in own]) for key, own in places.items()]
        cuts: dict[int, tokens.Cut] = {}
        for own, group in zip(places.values(), tokens.cut_choices(groups, self.tokenizer), strict=True):
            cuts.update(zip(own, group, strict=True))
        return [cuts[place] for place in range(len(requests))]

    def _named(self, request: Instance) -> str:
        if self.own is not None and request.task_name in LOCAL_TASKS:
            return f"{self.own}/test.jsonl, line {request.doc_id + 1}"
        return f"task {request.task_name}, item {request.doc_id}"

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        """The positions that are scored: those of padding may tell nothing."""
        scored = super()._select_cont_toks(logits, contlen, inplen)
        self._useless.append(finite.useless(scored).any())
        return scored

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return decode.forward_logits(self.model, inps)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        if generation_kwargs.pop("do_sample", False):
            raise ValueError("a task asks for do_sample: only greedy decoding is evaluated, leave it out")
        mask = generation_kwargs.pop("attention_mask")
        with _watched(self.model) as useless:
            ids = decode.generate(
                self.model,
                self.adapter,
                context,
                mask,
                max_length - context.shape[1],
                stop_at(self.tokenizer, stop, context.shape[1]),
            )
        for row in (row for rows_B in useless for row in rows_B.nonzero().flatten().tolist()):
            prompt = self.tokenizer.decode(context[row][mask[row].bool()])
            raise ValueError(f"after the prompt {prompt[-80:]!r} {NO_USE}")
        return _ended(ids, context.shape[1], self.tokenizer.eos_token_id)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """For every forward inside, which rows [B] had logits of no use; left on the device until somebody looks."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda *of: found.append(finite.useless(of[-1].logits).any(-1)))
    try:
        yield found
    finally:
        hook.remove()


def _ended(ids: Tensor, prompt_length: int, end: int | None) -> Tensor:
    """Ids [B, S] with end tokens alone behind the first: a row goes on until the last of its batch is finished."""
    if end is None:
        return ids
    new = ids[:, prompt_length:]
    over = (new == end).cumsum(-1) > 0
    return torch.cat([ids[:, :prompt_length], new.masked_fill(over, end)], dim=1)


def stop_at(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], prompt_length: int
) -> Callable[[Tensor], Tensor]:
    """A function from ids [B, S] to the rows [B] in which one of `texts`, or the end token, has been generated."""
    # a token carries a byte or more, so a text that has just been completed lies within this many tokens
    window = max(len(text.encode()) for text in texts)
    finished: set[int] = set()

    def stop(ids: Tensor) -> Tensor:
        recent = ids[:, max(prompt_length, ids.shape[1] - window) :].tolist()
        for row, last in enumerate(recent):
            if row not in finished and (
                last[-1] == tokenizer.eos_token_id or any(text in tokenizer.decode(last) for text in texts)
            ):
                finished.add(row)
        return torch.tensor([row in finished for row in range(ids.shape[0])], device=ids.device)

    return stop
