"""The model as lm-eval sees it: its requests go through the forward and the decode loop that are also timed.

In: a backbone, its tokenizer and an installed `Adapter` or None. Out: logits and greedy continuations for lm-eval.
Log-likelihoods are whole sequences, hence unmerged; generation decodes with the strategy under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from adafuse.adapters.adapter import Adapter
from adafuse.engine import decode


class AdaptedLM(HFLM):
    """HFLM whose two calls into the model are ours."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        adapter: Adapter | None,
        batch: int,
        merging: bool,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self.adapter = adapter
        self.generation_batch = 1 if merging else batch

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM, but one sequence at a time where the strategy merges: weights hold one selection."""
        batch, self.batch_size_per_gpu = self.batch_size, self.generation_batch
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return decode.forward_logits(self.model, inps)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        if generation_kwargs.pop("do_sample", False):
            raise ValueError(
                "a task asks for do_sample: only greedy decoding is evaluated, take it out of suite.tasks"
            )
        return decode.generate(
            self.model,
            self.adapter,
            context,
            generation_kwargs.pop("attention_mask"),
            max_length - context.shape[1],
            stop_at(self.tokenizer, stop, context.shape[1]),
        )


def stop_at(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], prompt_length: int
) -> Callable[[Tensor], Tensor]:
    """A function from ids [B, S] to the rows [B] in which one of `texts`, or the end token, has been generated."""
    # a token carries a byte or more, so a text that has just been completed lies within this many tokens
    window = max(len(text.encode()) for text in texts)
    finished: set[int] = set()

    def stop(ids: Tensor) -> Tensor:
        recent = ids[:, max(prompt_length, ids.shape[1] - window) :].tolist()
        for row, tokens in enumerate(recent):
            if row not in finished and (
                tokens[-1] == tokenizer.eos_token_id
                or any(text in tokenizer.decode(tokens) for text in texts)
            ):
                finished.add(row)
        return torch.tensor([row in finished for row in range(ids.shape[0])], device=ids.device)

    return stop
