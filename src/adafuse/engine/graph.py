"""The static runtimes: one decode step at fixed addresses, captured in a CUDA graph and replayed without the host.

`graph` captures transformers' own forward; `compiled` lets torch.compile fuse it first, and captures the result by
hand too. In both the projections are joined (projections.py), the cache has one shared position (cache.py), and
argmax and the next token's input stay on the device: a block of n tokens is n replays. In and out: as decoders.py
says. Without a CUDA device the same step runs uncaptured, which is how it is tested. Next: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafuse import strategies
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates, Router
from adafuse.config import Routing, Runtime, StrategyName
from adafuse.engine.cache import SharedPositionCache
from adafuse.engine.decode import collecting, decoding, installed, launched
from adafuse.model.llama import frozen_frequencies, windows
from adafuse.model.projections import Joint, Projection, join, placed
from adafuse.strategies import fused

WARMUP_STEPS = 3
MAX_COMPILED_ARMS = 64
# rows of the attention bias must be aligned for the memory-efficient attention kernel
SLOT_MULTIPLE = 64


class Static:
    """Owns the cache, the position and the graph. A graph holds addresses: it is valid while the strategy lives."""

    def __init__(
        self, model: nn.Module, adapter: Adapter | None, strategy: StrategyName, runtime: Runtime, length: int
    ) -> None:
        self.model, self.adapter, self.strategy = model, adapter, strategy
        # prepared at the first installation; its tensors are in the graph
        self._strategy = strategies.make(strategy)
        self.length = -(-(length + WARMUP_STEPS) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        self._projections = join(model)
        self._windows = windows(model.config)
        # `fused` without experts is the backbone through our own matrix-vector product
        self._product = fused.product if strategy is StrategyName.fused else _library_product
        self._forward: Callable[[], Tensor] = self._eager_forward
        if runtime is Runtime.compiled:
            # one function, compiled anew for every arm of a cell: not the runaway that the limit of 8 is there to stop
            torch._dynamo.config.recompile_limit = MAX_COMPILED_ARMS
            self._forward = torch.compile(self._eager_forward, fullgraph=True, dynamic=False)
        self._replay: Callable[[], None] | None = None
        self._addresses: list[int] = []
        self.said: list[tuple[Router, Gates]] = []
        self._rows = 0

    def installed(self) -> AbstractContextManager[None]:
        return installed(self.adapter, self._strategy)

    @torch.no_grad()
    def start(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Prefill, unmerged and uncaptured; logits [B, V]. The addresses stay those of the first call."""
        batch, prompt = ids_BS.shape
        if self._rows != batch:
            self._allocate(batch, ids_BS.device)
        counted_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        self.keep_BM.fill_(True)
        self.keep_BM[:, :prompt] = counted_BS
        self.pads_B1.copy_((~counted_BS).sum(-1, keepdim=True))
        slots = torch.arange(prompt, device=ids_BS.device)
        self.cache.slots = slots
        with collecting(self.adapter) as said:
            logits = self.model(
                input_ids=ids_BS,
                attention_mask=self._bias(slots),
                position_ids=(slots[None] - self.pads_B1).clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        self._choices = self.adapter.by_name(said, batch) if self.adapter else {}
        self.cache.slots = self.position
        self._first = prompt, [logits.argmax(-1, keepdim=True), *(one.clone() for one in self._state())]
        self.again(ids_BS)
        return logits

    def again(self, ids_BS: Tensor) -> None:
        """Whatever a block wrote behind the prompt is written anew before it is read."""
        prompt, first = self._first
        self._position = prompt
        self.position.fill_(prompt)
        for now, was in zip([self.token_B1, *self._state()], first, strict=True):
            now.copy_(was)

    def _state(self) -> list[Tensor]:
        """What a router reads of the token before, if one does."""
        return [] if self.cache.state_B1D is None else [self.cache.state_B1D]

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Decode steps happen inside; the first time, the step is captured. At the end the device's counters are read:
        a replay too many would have written past the cache, and taken a row of gates that is another token's.
        """
        with ExitStack() as stack:
            stack.enter_context(decoding(self.adapter))
            stack.enter_context(placed(self._plain_joints()))
            stack.enter_context(frozen_frequencies(self.model))
            addresses = self._addresses_now()
            assert self._replay is None or addresses == self._addresses, (
                "weights moved since the step was captured: make_room comes first, or make the decoder anew"
            )
            self._addresses = addresses
            if self._replay is None:
                self._replay = self._capture() if self.position.is_cuda else self._uncaptured
            yield
            counted = int(self.position)
            assert counted == self._position, f"decoded up to {counted}, launched up to {self._position}"

    def _addresses_now(self) -> list[int]:
        """Of what a captured step reads and others may move."""
        return [projection.weight_OI.data_ptr() for projection in self._projections]

    @torch.no_grad()
    def step(self, token_B1: Tensor) -> Tensor:
        self.token_B1.copy_(token_B1)
        self._launch(1)
        if self.adapter is not None:
            self._choices = self.adapter.by_name(self.said, self._rows)
        return self.logits_BV.clone()

    @torch.no_grad()
    def run(self, count: int) -> Tensor:
        """Goes on from the last token; nothing happens on the host but `count` launches."""
        begin = self._position
        self._launch(count)
        return self.ids_BM[:, begin + 1 : begin + count + 1]

    def run_uncaptured(self, count: int) -> None:
        """`run` without the graph: the same launches one by one, for who wants to see which module each belongs to."""
        replay, self._replay = self._replay, self._step
        try:
            self._launch(count)
        finally:
            self._replay = replay

    def watching(self) -> AbstractContextManager[None]:
        """The graph holds the choices anyway."""
        return nullcontext()

    def choices(self) -> dict[str, Tensor]:
        return self._choices

    def _launch(self, count: int) -> None:
        if self._position + count >= self.length:
            raise ValueError(f"the cache of {self.length} slots is full: make the decoder longer")
        assert self._replay is not None, "decode steps happen inside decoding()"
        for _ in range(count):
            self._replay()
        self._position += count
        launched(self.adapter, count)

    def _allocate(self, batch: int, device: torch.device) -> None:
        """Everything that a captured step reads or writes, once."""
        assert self._rows == 0, "a decoder keeps its batch: its graph holds addresses"
        self._rows = batch
        self.cache = SharedPositionCache(self.model.config.num_hidden_layers, self.length)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.token_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.pads_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.ids_BM = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        self.keep_BM = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        self.slots_M = torch.arange(self.length, device=device)
        vocabulary = self.model.config.vocab_size
        self.logits_BV = torch.empty(batch, vocabulary, dtype=self.model.dtype, device=device)
        self.floor = torch.full((), torch.finfo(self.model.dtype).min, dtype=self.model.dtype, device=device)

    def _bias(self, slots_S: Tensor) -> Tensor | dict[str, Tensor]:
        """What attention adds to its scores, [B, 1, S, M], as the model takes it: for all blocks, or by their kind."""
        found = {kind: self._bias_of(slots_S, window) for kind, window in self._windows.items()}
        return found.get("", found)

    def _bias_of(self, slots_S: Tensor, window: int | None) -> Tensor:
        """Nothing, or (where a slot is to come, out of the window or padding) the least number; minus infinity would
        make the rows of padding NaN.
        """
        seen = (self.slots_M <= slots_S[:, None]) & self.keep_BM[:, None, :]
        if window is not None:
            seen = seen & (self.slots_M > slots_S[:, None] - window)
        return torch.where(seen, torch.zeros_like(self.floor), self.floor)[:, None]

    def _eager_forward(self) -> Tensor:
        out = self.model(
            input_ids=self.token_B1,
            attention_mask=self._bias(self.position),
            position_ids=self.position - self.pads_B1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]

    @torch.no_grad()
    def _step(self) -> None:
        """One token: forward, argmax, and its id as the next input; no value ever reaches the host."""
        logits_BV = self._forward()
        self.logits_BV.copy_(logits_BV)
        self.token_B1.copy_(logits_BV.argmax(-1, keepdim=True))
        self.position.add_(1)
        self.ids_BM.index_copy_(1, self.position, self.token_B1)

    def _uncaptured(self) -> None:
        with collecting(self.adapter) as said:
            self._step()
        self.said = said

    def _plain_joints(self) -> list[Joint]:
        """The projections that no adapter has touched."""
        return [
            Joint(projection, partial(self._product, projection))
            for projection in self._projections
            if all(type(getattr(parent, name)) is nn.Linear for parent, name in projection.places)
        ]

    def _capture(self) -> Callable[[], None]:
        """Warm up on a side stream (first launches load modules, which capture forbids), then record one step."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        counters = [self.position, self.token_B1, *self._state()]
        if self.adapter is not None and self.adapter.context.gate_table is not None:
            counters.append(self.adapter.context.gate_table.step)
        before = [counter.clone() for counter in counters]
        # some releases of transformers put others in their place with every prompt, of the same values
        self._frequencies = self.model.get_submodule("model.rotary_emb").inv_freq
        with collecting(self.adapter) as said:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    self._step()
                    said.clear()  # torch.compile would compile once more for every length of this list
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._step()
            self.said = list(said)  # in the graph's own memory: every replay writes its token's choices there
        for counter, was in zip(counters, before, strict=True):
            counter.copy_(was)
        if self.adapter is not None and self.adapter.method.routing is not Routing.none:
            # The warm-up has merged too; the first token that counts finds clean weights, as in eager mode. Plain LoRA
            # is merged once, before the capture, and stays.
            self._strategy.restore()
        return graph.replay


def _library_product(projection: Projection, x_TI: Tensor) -> Tensor:
    return F.linear(x_TI, projection.weight_OI, projection.bias_O)
