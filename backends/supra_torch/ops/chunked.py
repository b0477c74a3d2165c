"""The chunked form of causal linear attention in torch, linear in T: for CPUs, and the fallback.

For chunks of C tokens the sum inside a chunk is two matrix products, everything before it comes
from the state at the chunk's border. All exponents of gamma are >= 0 and gamma <= 1, so nothing
overflows, however fast a head decays. Products are taken in the type of q; sums, decay and state
are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from supra_torch.ops.dense import safe_divide


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :class:`~supra_torch.ops.linear_attention.Operator` says.

    Key/value heads are never repeated: the G = H / K query heads of a group are rows, or columns,
    of one matrix product.
    """
    if cu_seqlens is not None:
        raise ValueError("the chunked form does not take packed sequences yet")
    output, total, state = _chunked(q, k, v, slope, initial_state, mask, chunk_size, normalise)
    if total is None:
        return output.to(q.dtype), output.new_empty(0), state
    return safe_divide(output, total).to(q.dtype), total[..., 0], state


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
    sum_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, not yet divided; what to divide it by, (B, T, H, 1); final state."""
    B, T, H, Dk = q.shape
    K, Dv = v.shape[2], v.shape[3]
    G, C = H // K, min(chunk_size, T)
    N = -(-T // C)
    slope = slope.view(K, G)
    ages, valid = _chunk_ages(mask, T, N, C, q.device)  # (b, N, C), b = 1 without a mask
    k, v = k.to(q.dtype), v.to(q.dtype)
    q = _into_chunks(q, N, C).view(B, N, C, K, G, Dk).permute(0, 3, 1, 4, 2, 5)
    q = q.reshape(B, K, N, G * C, Dk)
    k, v = (_into_chunks(x, N, C).permute(0, 3, 1, 2, 4) for x in (k, v))  # (B, K, N, C, ·)

    # Inside the chunks. Without a mask all chunks agree: the last one is filled up, but with
    # keys that are zero.
    alike = slice(0, 1) if mask is None else slice(None)
    weights = _inner_weights(slope, ages[:, alike], valid[:, alike])  # (b, K, n, G, C, C)
    scores = (q @ k.mT).view(B, K, N, G, C, C).float() * weights
    output = (scores.to(v.dtype).view(B, K, N, G * C, C) @ v).float()

    # What each chunk adds to the state at its end, (B, K, N, Dk, G, Dv).
    s = slope[None, :, None, None, :]  # against (b, K, N, C, G)
    age, end = ages[:, None, :, :, None], ages[:, None, :, -1:, None]
    left = torch.exp(-s * (end - age)) * valid[:, None, :, :, None]
    weighted = v[..., None, :] * left[..., None].to(v.dtype)  # (B, K, N, C, G, Dv)
    added = (k.mT @ weighted.flatten(-2)).float().view(B, K, N, Dk, G, Dv)
    kept = torch.exp(-s * end).transpose(-1, -2)  # (b, K, N, G, 1)
    state, z = _initial_state(initial_state, added, K, G, sum_weights)  # (B,K,Dk,G,Dv), (B,K,Dk,G)
    grown = torch.exp(-s * age).transpose(-1, -2).reshape(-1, K, N, G * C, 1)
    total = None
    if initial_state is None and N == 1:
        state = added[:, :, 0]
    else:
        state, before = _scan(state, added, kept[:, :, :, None])  # kept (b, K, N, 1, G, 1)
        # (B, K, N, Dk, G, Dv) -> each group member's own state for its rows of q.
        before = before.permute(0, 1, 2, 4, 3, 5).to(q.dtype)  # (B, K, N, G, Dk, Dv)
        read = (q.view(B, K, N, G, C, Dk) @ before).reshape(B, K, N, G * C, Dv)
        output = output + grown * read.float()
    if sum_weights:
        assert z is not None
        added_z = k.float().mT @ left.expand(B, -1, -1, -1, -1)  # (B, K, N, Dk, G)
        z, before_z = _scan(z, added_z, kept.mT)
        read_z = q.view(B, K, N, G, C, Dk).float() @ before_z.mT[..., None]
        total = scores.sum(-1).view(B, K, N, G * C, 1) + grown * read_z.view(B, K, N, G * C, 1)
        state = torch.cat([state, z[..., None]], dim=-1)
        total = _out_of_chunks(total, T, G)
    final = state.permute(0, 1, 3, 2, 4).reshape(B, H, Dk, -1)
    return _out_of_chunks(output, T, G), total, final


def _initial_state(
    initial: Tensor | None, added: Tensor, K: int, G: int, sum_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """The state before the first chunk: (B, K, Dk, G, Dv), and z (B, K, Dk, G) if asked for."""
    B, Dk, Dv = added.shape[0], added.shape[3], added.shape[5]
    if initial is None:
        z = added.new_zeros(B, K, Dk, G) if sum_weights else None
        return added.new_zeros(B, K, Dk, G, Dv), z
    state = initial.float().view(B, K, G, Dk, -1).permute(0, 1, 3, 2, 4)
    return state[..., :Dv], state[..., Dv] if sum_weights else None


def _scan(state: Tensor, added: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """state_n+1 = kept_n state_n + added_n over axis 2: the last state, and those before each n."""
    before = []
    for n in range(added.shape[2]):
        before.append(state)
        state = kept[:, :, n] * state + added[:, :, n]
    return state, torch.stack(before, dim=2)


def _into_chunks(x: Tensor, N: int, C: int) -> Tensor:
    """(B, T, heads, D) -> (B, N, C, heads, D), the last chunk filled with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, N * C - x.shape[1]))
    return x.view(x.shape[0], N, C, *x.shape[2:])


def _out_of_chunks(x: Tensor, T: int, G: int) -> Tensor:
    """(B, K, N, G * C, D) -> (B, T, H, D)."""
    B, K, N, rows, D = x.shape
    x = x.view(B, K, N, G, rows // G, D).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, N * (rows // G), K * G, D)[:, :T]


def _chunk_ages(
    mask: Tensor | None, T: int, N: int, C: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Valid tokens of its chunk up to each token, and which are valid: (B or 1, N, C) float32."""
    valid = torch.ones(1, T, device=device) if mask is None else mask.float()
    valid = F.pad(valid, (0, N * C - T)).view(-1, N, C)
    return valid.cumsum(-1), valid


def _inner_weights(slope: Tensor, ages: Tensor, valid: Tensor) -> Tensor:
    """gamma^(n_i - n_j) for valid j <= i of a chunk: (b, K, n, G, C, C)."""
    exponent = (ages[..., :, None] - ages[..., None, :]).clamp(min=0)
    causal = torch.ones(exponent.shape[-2:], device=exponent.device).tril()
    seen = causal * valid[..., None, :]
    decayed = torch.exp(-slope[None, :, None, :, None, None] * exponent[:, None, :, None])
    return decayed * seen[:, None, :, None]
