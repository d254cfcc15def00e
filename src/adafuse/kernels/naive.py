"""What every kernel means, in a few lines of PyTorch: the definition that the tests hold the kernels to.

In and out: the arguments of the kernels in gather.py, fused.py and switch.py, one for one. Sums are taken in fp32 and
rounded once. ops.py runs these functions on a CPU.

Letters: T tokens, K chosen experts, E experts, R rank, I in, O out, P partial sums (whoever reads them adds them up).
Linears that share an input form one projection: G members with experts, each with its R rows of the C = G * R rows of
`lora_A`, and its columns of the joined `lora_B`. `members` lists (first column of y, width) of each, in that order.
A name that ends in an underscore writes in place. A slot whose weight (gate) is exactly zero is no slot: its factors
are not read and add nothing, whatever they hold, and a token all of whose weights are zero keeps its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adafuse.kernels.config import Members


def shrink(x_TI: Tensor, lora_A_ECI: Tensor, index_TK: Tensor) -> Tensor:
    """h[1, T, K, C] = A[e] x of each token's chosen experts."""
    return torch.einsum("ti,tkci->tkc", x_TI.float(), lora_A_ECI[index_TK].float())[None]


def expand_(
    y_TO: Tensor,
    h_PTKC: Tensor,
    lora_B_EOR: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    members: Members,
    scaling: float,
    gelu: bool = False,
) -> None:
    """y += scaling * sum_k weight_k B[e_k] h_k, member by member; with `gelu`, of gelu(h) (PESC)."""
    h_TKC = F.gelu(h_PTKC.sum(0)) if gelu else h_PTKC.sum(0)
    _add(y_TO, h_TKC, weight_TK * scaling, lora_B_EOR, index_TK, members)


def expand_all_(
    y_TO: Tensor,
    u_TS: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    members: Members,
    scaling: float,
    gelu: bool = False,
) -> None:
    """y += scaling * sum_k weight_k B[e_k] u[e_k], member by member; u[T, S = G * E * R] is A x of all experts.

    index and weight are of each member, or (G = 1) shared by all. With `gelu`, of gelu(u).
    """
    (experts, _, rank), start = lora_B_EOR.shape, 0
    u_TGER = (F.gelu(u_TS.float()) if gelu else u_TS.float()).unflatten(1, (len(members), experts, rank))
    shape = (-1, len(members), -1)
    index_TGK, weight_TGK = index_TGK.expand(shape).long(), weight_TGK.expand(shape) * scaling
    for g, member in enumerate(members):
        index_TK, up_EOR = index_TGK[:, g], lora_B_EOR[:, start : start + member[1]]
        h_TKR = u_TGER[:, g].gather(1, index_TK[..., None].expand(-1, -1, rank))
        _add(y_TO, h_TKR, weight_TGK[:, g], up_EOR, index_TK, [member])
        start += member[1]


def expand_routed_(
    y_TO: Tensor,
    u_TS: Tensor,
    logits_TGE: Tensor,
    lora_B_EOR: Tensor,
    members: Members,
    top_k: int,
    raw: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`expand_all_` with what each member's own router chooses: index[T, G, K] (int64) and weight[T, G, K] (fp32).

    The logits are [T, G, E] or [T, G * E]; `route` says what the weights are.
    """
    logits_TGE = logits_TGE.reshape(len(y_TO), len(members), -1)
    index_TGK, weight_TGK = _choose(logits_TGE.float(), top_k, raw)
    expand_all_(y_TO, u_TS, lora_B_EOR, index_TGK, weight_TGK, members, scaling)
    return index_TGK, weight_TGK


def route(x_TI: Tensor, router_GEI: Tensor, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """index[T, G, K] (int64), weight[T, G, K] and softmax[T, G, E] (fp32) of G routers that look at the same x.

    The weights are the softmax over the chosen experts, or (`raw`) their share of the whole softmax.
    """
    logits_TGE = torch.einsum("ti,gei->tge", x_TI.float(), router_GEI.float())
    return *_choose(logits_TGE, top_k, raw), torch.softmax(logits_TGE, dim=-1)


def thirds(weight_EI: Tensor, dtype: torch.dtype) -> Tensor:
    """[3 * E, I] in bf16, the largest part first: three of 8 bits hold all 24 of a weight in fp32."""
    parts, rest_EI = [], weight_EI
    for _ in range(3):
        parts.append(rest_EI.to(dtype))
        rest_EI = rest_EI - parts[-1]
    return torch.cat(parts)


def gates(parts_TS: Tensor, routers: int, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` of logits that are the sum of three parts, [T, 3 * G * E], and its weights also of all experts, zero
    where not chosen: index[G, T, K] (int64), weight[G, T, K], softmax[G, T, E] and weight[G, T, E] (fp32).
    """
    high_GTE, middle_GTE, low_GTE = parts_TS.unflatten(1, (3, routers, -1)).permute(1, 2, 0, 3)
    # the small parts first
    logits_GTE = low_GTE + middle_GTE + high_GTE
    index_GTK, weight_GTK = _choose(logits_GTE, top_k, raw)
    dense_GTE = torch.zeros_like(logits_GTE).scatter(-1, index_GTK, weight_GTK)
    return index_GTK, weight_GTK, torch.softmax(logits_GTE, dim=-1), dense_GTE


def gates_backward(
    of_weight_GTK: Tensor | None,
    of_probs_GTE: Tensor | None,
    of_dense_GTE: Tensor | None,
    chosen: tuple[Tensor, Tensor, Tensor],
    raw: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits, [T, G * E], from those of what `gates` gave (None is zero) and its index, softmax and
    weight[G, T, E]: `chosen`.
    """
    index_GTK, probs_GTE, dense_GTE = chosen
    of_all_GTE = torch.zeros_like(probs_GTE) if of_dense_GTE is None else of_dense_GTE
    if of_weight_GTK is not None:
        of_all_GTE = of_all_GTE.scatter_add(-1, index_GTK, of_weight_GTK)
    terms_GTE = dense_GTE * of_all_GTE
    of_logits_GTE = terms_GTE - (probs_GTE if raw else dense_GTE) * terms_GTE.sum(-1, keepdim=True)
    if of_probs_GTE is not None:
        terms_GTE = probs_GTE * of_probs_GTE
        of_logits_GTE = of_logits_GTE + terms_GTE - probs_GTE * terms_GTE.sum(-1, keepdim=True)
    return of_logits_GTE.to(dtype).transpose(0, 1).flatten(1)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """y = W x + b."""
    y_TO = x_TI.float() @ weight_OI.float().T
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def fused(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    lora_A_ECI: Tensor,
    lora_B_EOR: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    members: Members,
    scaling: float,
) -> Tensor:
    """`linear`, `shrink` and `expand_` as one function, rounded once."""
    y_TO = linear(x_TI.float(), weight_OI, bias_O)
    h_PTKC = shrink(x_TI, lora_A_ECI, index_TK)
    expand_(y_TO, h_PTKC, lora_B_EOR, index_TK, weight_TK, members, scaling)
    return y_TO.to(x_TI.dtype)


def switch_(
    weights: list[Tensor], lora_A: list[Tensor], lora_B: list[Tensor], index_S: Tensor, gate_S: Tensor
) -> None:
    """W += sum_s gate_s B[e_s] A[e_s] for every linear: new experts with their gates, old ones with minus theirs.

    Without any gate nothing is written.
    """
    rebase_(weights, weights, lora_A, lora_B, index_S, gate_S, gate_S)


def rebase_(
    weights: list[Tensor],
    clean: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    index_S: Tensor,
    gate_S: Tensor,
    held_H: Tensor,
) -> None:
    """W = W_0 + sum_s gate_s B[e_s] A[e_s] for every linear, whatever W held before.

    `held_H` are the gates of what W holds: if all are zero W is W_0, and without any new gate nothing is written.
    """
    used_S = gate_S != 0
    index_S, gate_S = index_S[used_S], gate_S[used_S].float()
    if not (len(gate_S) or held_H.any()):
        return
    for weight_OI, clean_OI, A_ERI, B_EOR in zip(weights, clean, lora_A, lora_B, strict=True):
        delta_OI = torch.einsum("s,sor,sri->oi", gate_S, B_EOR[index_S].float(), A_ERI[index_S].float())
        # minus zero plus zero would be zero
        weight_OI.copy_(clean_OI.float() + delta_OI if len(gate_S) else clean_OI)


def _choose(logits_TGE: Tensor, top_k: int, raw: bool) -> tuple[Tensor, Tensor]:
    best_TGK, index_TGK = logits_TGE.topk(top_k, dim=-1)
    probs_TGE = torch.softmax(logits_TGE, dim=-1)
    return index_TGK, probs_TGE.gather(-1, index_TGK) if raw else torch.softmax(best_TGK, dim=-1)


def _add(
    y_TO: Tensor, h_TKC: Tensor, weight_TK: Tensor, lora_B_EOR: Tensor, index_TK: Tensor, members: Members
) -> None:
    """y += sum_k weight_k B[e_k] h_k for each member's columns of y, rows of h and columns of the joined B."""
    rank, start, used_TK = lora_B_EOR.shape[-1], 0, weight_TK != 0
    h_TKC = (h_TKC.float() * weight_TK[..., None]).where(used_TK[..., None], 0.0)
    for g, (column, width) in enumerate(members):
        up_TKOR = lora_B_EOR[:, start : start + width][index_TK].float()
        up_TKOR = up_TKOR.where(used_TK[..., None, None], 0.0)
        delta_TO = torch.einsum("tkr,tkor->to", h_TKC[..., g * rank : (g + 1) * rank], up_TKOR)
        here = y_TO[:, column : column + width]
        here.copy_(torch.where(used_TK.any(-1, keepdim=True), here.float() + delta_TO, here.float()))
        start += width
