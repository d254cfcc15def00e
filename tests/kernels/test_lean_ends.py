"""kernels/attend.py and kernels/ends.py: what stands between the products of a lean step, against its meaning."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from adafuse.kernels import attend, ends, lean
from adafuse.kernels.beside import DOWN
from adafuse.kernels.config import AttendCut
from synthetic.fused import DEVICE, MACHINES

# sequences, key heads, query heads of each, width, window, norms
HEADS = {
    "one group": (2, 2, 1, 16, None, False),
    "grouped": (3, 1, 3, 24, None, True),
    "window": (2, 1, 2, 8, 9, False),
}
CUT = AttendCut(block=16, splits=3, least=8, warps=1)
SLOTS, SCALE, EPS = 64, 0.3, 1e-5


def case(name: str, device: str, dtype: torch.dtype, position: int, cut: AttendCut = CUT) -> attend.Attend:
    sequences, kv_heads, group, width, window, normed = HEADS[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, to)

    keys, values = normal(sequences, kv_heads, SLOTS, width), normal(sequences, kv_heads, SLOTS, width)
    # where no token is yet anything may lie
    keys[:, :, position:], values[:, :, position:] = torch.nan, torch.nan
    qkv = normal(sequences, (group + 2) * kv_heads * width, to=torch.float32)
    angles = torch.arange(SLOTS)[:, None] * torch.rand(width // 2, generator=generator)
    return attend.Attend(
        qkv=qkv,
        keys=keys,
        values=values,
        out=torch.full((sequences, kv_heads * group * width), math.nan, device=device, dtype=dtype),
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        position=torch.tensor([position], device=device),
        pads_B=torch.tensor([0, 5, 11][:sequences], device=device),
        q_norm=normal(width) if normed else None,
        k_norm=normal(width) if normed else None,
        eps=EPS,
        scale=SCALE,
        window=window,
        partial=attend.room(sequences, kv_heads, group, width, cut, torch.device(device)),
        cut=cut,
    )


def meaning(work: attend.Attend, mutate: str = "") -> torch.Tensor:
    """Heads' outputs, in fp32, sequence by sequence; writes k and v of the token into the cache, as the launch does."""
    (sequences, kv_heads, _, width), position, rows = work.keys.shape, int(work.position), []
    group = work.out.shape[1] // (kv_heads * width)
    for b in range(sequences):
        heads = work.qkv[b].view(-1, width)
        q, k, v = heads.split([kv_heads * group, kv_heads, kv_heads])
        pads = 0 if mutate == "pads" else int(work.pads_B[b])
        q, k = (
            _turned(x, norm, work, position - pads, mutate)
            for x, norm in ((q, work.q_norm), (k, work.k_norm))
        )
        work.keys[b, :, position], work.values[b, :, position] = (
            k.to(work.keys.dtype),
            v.to(work.values.dtype),
        )
        first = pads if work.window is None or mutate == "window" else max(pads, position - work.window + 1)
        last = position if mutate == "own" else position + 1
        K = work.keys[b, :, first:last].float().repeat_interleave(group, 0)
        V = work.values[b, :, first:last].float().repeat_interleave(group, 0)
        scores = torch.einsum("hd,hnd->hn", q, K) * (1.0 if mutate == "scale" else work.scale)
        rows.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), V).flatten())
    return torch.stack(rows)


def _turned(x, norm, work, position, mutate):
    if norm is not None and mutate != "norm":
        x = F.rms_norm(x, x.shape[-1:], norm.float(), work.eps)
    one, two = x.chunk(2, dim=-1)
    cos, sin = work.cos[position], work.sin[position]
    sin = -sin if mutate == "turn" else sin
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """q, k and weights are rounded once each before the sums, and the sums at the end."""
    units = 64 if got.dtype == torch.float32 else 8
    return bool(
        (got.float() - want.float()).abs().max() <= units * torch.finfo(got.dtype).eps * want.abs().max()
    )


@pytest.mark.parametrize("position", [0, 12, 40])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_attention(device, dtype, name: str, position: int) -> None:
    if position == 0:
        # nothing is in the cache yet: the token sees itself alone
        work = case(name, device, dtype, 0)
        work.pads_B.zero_()
        attend.attend(work)
        assert near(work.out, meaning(work))
        return
    work = case(name, device, dtype, position)
    attend.attend(work)
    written = work.keys[:, :, position].clone(), work.values[:, :, position].clone()
    want = meaning(work)
    assert near(work.out, want)
    assert near(written[0], work.keys[:, :, position]) and torch.equal(
        written[1], work.values[:, :, position]
    )
    assert not work.partial.ended.any()
    # again, as the next layer does: whatever is kept between launches is as it was
    once = work.out.clone()
    attend.attend(work)
    assert torch.equal(work.out, once)


@pytest.mark.parametrize("mutation", ["pads", "scale", "turn", "own"])
def test_wrong_attention_is_seen(mutation: str) -> None:
    work = case("grouped", DEVICE, torch.float32, 40)
    attend.attend(work)
    assert near(work.out, meaning(work)) and not near(work.out, meaning(work, mutation))


@pytest.mark.parametrize(("name", "mutation"), [("window", "window"), ("grouped", "norm")])
def test_windows_and_norms_are_seen(name: str, mutation: str) -> None:
    work = case(name, DEVICE, torch.float32, 40)
    attend.attend(work)
    assert near(work.out, meaning(work)) and not near(work.out, meaning(work, mutation))


@pytest.mark.parametrize("splits", [1, 4])
def test_parts_add_up_to_the_whole(splits: int) -> None:
    cut = replace(CUT, splits=splits)
    work = case("one group", DEVICE, torch.float32, 50, cut)
    attend.attend(work)
    assert near(work.out, meaning(work))


@pytest.mark.parametrize(("device", "dtype"), MACHINES)
def test_embedding(device, dtype) -> None:
    table, norm = torch.randn(9, 20, device=device).to(dtype), torch.randn(20, device=device).to(dtype)
    token = torch.tensor([3, 8], device=device)
    total, squares = torch.full((2, 20), math.nan, device=device), torch.full((2, 5), math.nan, device=device)
    following = torch.full((2, 20), math.nan, device=device, dtype=dtype)
    ends.embed(token, table, lean.Residual(total, norm, following, squares))
    want = table[token].float()
    assert torch.equal(total, want) and near(following, want * norm.float())
    assert torch.allclose(squares.sum(1), want.square().sum(1))


def decision(null: bool, normed: bool, raw: bool, **table: torch.Tensor) -> ends.Decision:
    torch.manual_seed(0)
    x, experts = torch.randn(3, 50, device=DEVICE), 5
    norm = lean.Norm(torch.rand(3, 4, device=DEVICE) * 50, EPS)
    router = 0.2 * torch.randn(experts + null, 50, device=DEVICE)
    if null:
        # the last row leads for the second token alone
        router[-1] = 0.4 * x[1] - 0.2 * (x[0] + x[2])
    index = torch.full((3, 2), -1, dtype=torch.int64, device=DEVICE)
    weight, probs = (torch.full(size, math.nan, device=DEVICE) for size in ((3, 2), (3, experts)))
    return ends.Decision(x, norm, router, index, weight, probs, raw, null, 1e-6 if normed else None, **table)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("null", "raw"), [(False, False), (False, True), (True, False)])
def test_a_decision_is_what_the_router_says(null: bool, raw: bool, normed: bool) -> None:
    from adafuse.adapters.router import Router
    from adafuse.config import Normalisation

    work = decision(null, normed, raw)
    kind = Normalisation.softmax_topk_raw if raw else Normalisation.softmax_topk_renorm
    router = Router(50, 5, 2, kind, null, normed).to(DEVICE)
    router.weight.data.copy_(work.router_EI)
    ends.decide(work)
    scale = (work.norm.squares_TP.sum(1, keepdim=True) / 50 + EPS).rsqrt()
    want = router(work.x_TI * scale)
    used_T = want.weight_TK.any(-1)
    assert torch.equal(work.index_TK[used_T], want.index_TK[used_T])
    assert torch.allclose(work.weight_TK, want.weight_TK, atol=1e-5)
    assert torch.allclose(work.probs_TE, want.probs_TE, atol=1e-5)
    assert used_T.tolist() == [True, not null, True]


@pytest.mark.parametrize("raw", [False, True])
def test_a_table_names_the_experts(raw: bool) -> None:
    index = torch.randint(5, (4, 3, 2), device=DEVICE)
    used = torch.tensor([[True, False, True]] * 4, device=DEVICE)
    work = decision(False, False, raw, table_NTK=index, used_NT=used, step_1=torch.tensor([6], device=DEVICE))
    ends.decide(work)
    want = work.probs_TE.gather(1, index[2])
    want = (want if raw else want / want.sum(1, keepdim=True)) * used[2][:, None]
    assert torch.equal(work.index_TK, index[2]) and torch.allclose(work.weight_TK, want)


def following(logits: torch.Tensor, temperature: float = 0.0, seed: int = 0, position: int = 7) -> ends.Next:
    tokens, pieces = len(logits), ends.pieces_of(logits.shape[1])
    where = {"device": DEVICE}
    return ends.Next(
        logits_TV=logits.to(DEVICE),
        token_T=torch.full((tokens,), -1, **where),
        ids_TM=torch.full((tokens, 16), -1, **where),
        position=torch.tensor([position], **where),
        step=torch.tensor([position], **where),
        temperature=torch.tensor([temperature], **where),
        seed=torch.tensor([seed], **where),
        best=torch.full((tokens, pieces), math.nan, **where),
        found=torch.full((tokens, pieces), -1, dtype=torch.int32, **where),
        ended=torch.zeros(1, dtype=torch.int32, **where),
        flags=torch.ones(5000, dtype=torch.int32, **where),
    )


@pytest.mark.parametrize("words", [50, 701])
def test_the_next_token_is_the_first_of_the_largest(words: int) -> None:
    logits = torch.randn(3, words)
    logits[0, [4, 20, words - 1]] = 9.0
    logits[2] = torch.nan
    work = following(logits)
    ends.choose_next(work)
    assert work.token_T[:2].tolist() == [4, int(logits[1].argmax())] and 0 <= int(work.token_T[2]) < words
    assert torch.equal(work.ids_TM[:, 8], work.token_T) and (work.ids_TM == -1).sum() == 3 * 15
    assert (int(work.position), int(work.step), int(work.ended)) == (8, 8, 0) and (work.flags == DOWN).all()


def test_sampling_follows_the_softmax_and_its_seed() -> None:
    """3,000 rows are 3,000 draws; a share may be four of its own standard deviations off."""
    logits, temperature = torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.7
    work = following(logits.expand(3000, -1).contiguous(), temperature, seed=5) if DEVICE == "cuda" else None
    draws = [following(logits.expand(100, -1).contiguous(), temperature, seed, 3) for seed in range(4)]
    for one in [work] if work else draws:
        ends.choose_next(one)
    tokens = work.token_T if work else torch.cat([one.token_T for one in draws])
    want = torch.softmax(logits / temperature, 0)
    share = torch.bincount(tokens.cpu(), minlength=4) / len(tokens)
    assert bool(((share - want).abs() <= 4 * (want * (1 - want) / len(tokens)).sqrt()).all()), (share, want)
    again = following(draws[0].logits_TV, temperature, 0, 3)
    ends.choose_next(again)
    if work is None:
        assert torch.equal(again.token_T, draws[0].token_T)
        assert not torch.equal(draws[0].token_T, draws[1].token_T)
