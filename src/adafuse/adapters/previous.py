"""A gate that knows more and still decides before the token starts: it reads the last state of the token before.

In: a model, the `Context` of its adapter, the router. Out: hooks on the model's body that decide ahead of its first
block. Tokens that are processed together cannot take what was before them from the pass that counts: its states depend
on the gates that are sought. They take it from a draft of it, an adapted pass whose gates are from a pass of the plain
backbone; both are without a gradient. Tokens that are decoded one by one take the adapted state of the token before,
which lies with their cache. Ones stand where a sequence begins: of zeros all experts would be tied.
Letters: B sequences, S tokens, D width. Next: adapter.py, which installs the hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from adafuse.adapters.layers import Context
from adafuse.adapters.router import NORM_EPS, Gates, Router
from adafuse.config import RouterInput

# of a cache: the state [B, 1, D] of each row's last token, and after how many tokens it was
STATE, LENGTH = "state_B1D", "state_length"
# every number of what stands before a first token
BEGIN = 1.0


def follow(model: nn.Module, context: Context, router: Router, point: RouterInput) -> list[RemovableHandle]:
    """From now on every forward decides once, before its first block, from what stands before its tokens."""
    body = model.get_submodule("model")
    return [
        body.register_forward_pre_hook(partial(_decide, context, router, point), with_kwargs=True),
        body.register_forward_hook(_keep, with_kwargs=True),
    ]


def _decide(
    context: Context,
    router: Router,
    point: RouterInput,
    body: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The body goes on from the embeddings, which are looked up once."""
    if options.get("inputs_embeds") is None:
        ids_BS = options.get("input_ids", args[0] if args else None)
        options = options | {"input_ids": None, "inputs_embeds": body.get_submodule("embed_tokens")(ids_BS)}
        args = (None, *args[1:]) if args else args
    read = partial(_read, point, options["inputs_embeds"].detach())
    if context.decoding:
        cache, rows = options.get("past_key_values"), len(options["inputs_embeds"])
        context.decide(router, read(_of_cache(cache, rows)))
    else:
        states_BSD, draft = _drafted(context, router, read, body, args, options)
        context.decide(router, read(states_BSD), draft)
    return args, options


@torch.no_grad()
def _drafted(
    context: Context,
    router: Router,
    read: Callable[[Tensor], Tensor],
    body: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Gates]:
    """[B, S, D]: what stands in the draft before these tokens, which nothing may precede; and its own gates. Neither
    pass drops out or recomputes anything, in a fit either.
    """
    shifted = partial(_shifted, options=options)
    cache = options.get("past_key_values")
    # what is written at fixed places is written anew by the pass that counts
    if not getattr(cache, "fixed", False):
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "the router reads the token before (router_input), so only decode steps go on from a cache: give a "
                "prompt whole, to an adapter in service"
            )
        options = options | {"past_key_values": None, "use_cache": False}
    fitting = [module for module in body.modules() if module.training]
    body.eval()
    context.silent = True
    try:
        plain_BSD = shifted(body.forward(*args, **options)[0])
        context.silent = False
        context.gates = draft = router(read(plain_BSD).flatten(0, 1))
        return shifted(body.forward(*args, **options)[0]), draft
    finally:
        context.silent = False
        for module in fitting:
            module.training = True


def _read(point: RouterInput, embedded_BSD: Tensor, before_BSD: Tensor) -> Tensor:
    """What the router sees: the states before these tokens, alone or beside their embeddings."""
    if point is RouterInput.previous_token:
        return before_BSD
    return _normed(before_BSD) + _normed(embedded_BSD)


def _shifted(states_BSD: Tensor, options: dict[str, Any]) -> Tensor:
    """Each token's state at the one behind it, BEGIN at the first of a sequence: behind padding too, whose end is told
    by positions (0 at a first token), or by the mask where there are none.
    """
    previous_BSD = F.pad(states_BSD[:, :-1], (0, 0, 1, 0), value=BEGIN)
    position_BS, mask = options.get("position_ids"), options.get("attention_mask")
    if position_BS is None and isinstance(mask, Tensor) and mask.ndim == 2:
        position_BS = mask.cumsum(-1) - 1
    if position_BS is None:
        return previous_BSD
    return previous_BSD.masked_fill((position_BS <= 0)[..., None], BEGIN)


def _normed(x_BSD: Tensor) -> Tensor:
    """At a root mean square of 1: states and embeddings differ in scale."""
    return F.rms_norm(x_BSD.float(), x_BSD.shape[-1:], eps=NORM_EPS).to(x_BSD.dtype)


def _of_cache(cache: Any, rows: int) -> Tensor:
    state_B1D: Tensor | None = getattr(cache, STATE, None)
    fixed = getattr(cache, "fixed", False)
    cropped = state_B1D is not None and not fixed and cache.get_seq_length() != getattr(cache, LENGTH)
    if state_B1D is None or len(state_B1D) != rows or cropped:
        raise ValueError(
            f"the router reads the token before (router_input), whose state this cache does not hold for {rows} rows: "
            "fill it, whole, by a forward of the adapted model"
        )
    return state_B1D


def _keep(body: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
    """The state of the last token beside its keys and values; where steps are captured, always in the same place."""
    cache = output.get("past_key_values")
    if cache is None:
        return
    state_B1D = output[0][:, -1:].detach()
    kept = getattr(cache, STATE, None)
    if kept is not None and getattr(cache, "fixed", False):
        kept.copy_(state_B1D)
    else:
        # a copy: of a prompt it would hold all states
        setattr(cache, STATE, state_B1D.clone())
    if not getattr(cache, "fixed", False):
        setattr(cache, LENGTH, cache.get_seq_length())
