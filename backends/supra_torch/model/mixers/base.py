"""What every mixer's module has and answers: the four projections, and how its memory behaves."""

from __future__ import annotations

from torch import Tensor, nn

from supra_core.mixers.base import MixerKind, ModelFields
from supra_torch.model.layers import NormLayer, Positions

LayerState = dict[str, Tensor]


class OwnedLayerState(LayerState):
    """A layer's state that a decode step may overwrite."""


def has_fixed_size(kind: MixerKind) -> bool:
    """Whether a mixer's memory has one size from the first token on."""
    return not kind.memory_grows and kind.fills_at is None


class MixerModule(nn.Module):
    """The base of all mixers. A kind's module computes :meth:`heads_output`.

    A state is named tensors, batch first; ``valid`` says which of its slots hold tokens.
    ``query_size``: channels of a query head; ``query_bias``: whether q_proj and k_proj have biases.
    """

    def __init__(
        self, spec: ModelFields, kind: MixerKind, query_size: int, query_bias: bool
    ) -> None:
        super().__init__()
        D, H, K = spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads
        bias = spec.attention_bias
        self.mixer = kind
        self.heads, self.key_value_heads = H, K
        self.q_proj = nn.Linear(D, H * query_size, bias=query_bias)
        self.k_proj = nn.Linear(D, K * query_size, bias=query_bias)
        self.v_proj = nn.Linear(D, K * spec.value_head_dim, bias=bias != "none")
        self.o_proj = nn.Linear(H * spec.value_head_dim, D, bias=bias == "qkvo")
        self.query_scale = 1.0 if kind.folded else spec.query_scale
        self.per_head = spec.query_key_norm == "per_head"
        self.q_proj_norm = self.k_proj_norm = None
        if spec.query_key_norm != "none":
            d = spec.head_dim
            self.q_proj_norm = NormLayer(d if self.per_head else H * d, spec.norm)
            self.k_proj_norm = NormLayer(d if self.per_head else K * d, spec.norm)

    def forward(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """x (B, T, D) -> (B, T, D) and the new state; mask (B, T) bool, False for padding."""
        out, memory = self.heads_output(x, positions, state, mask)
        return self.o_proj(out.flatten(-2)), memory

    def heads_output(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """What o_proj receives, (B, T, H, Dv), and the new state."""
        raise NotImplementedError

    def can_search(self, teacher: MixerModule) -> bool:
        """Whether calibration can set the heads' own parameters by search after ``teacher``."""
        return False

    # --- projections ------------------------------------------------------------------------

    @property
    def projects_plainly(self) -> bool:
        """Whether queries and keys are products with q_proj and k_proj and nothing more."""
        return self.q_proj_norm is None and self.query_scale == 1.0

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, ·) and k (B, T, K, ·), normed and scaled."""
        q = self._normed(self.q_proj(x), self.q_proj_norm, self.heads)
        k = self._normed(self.k_proj(x), self.k_proj_norm, self.key_value_heads)
        return q if self.query_scale == 1.0 else q * self.query_scale, k

    def _normed(self, z: Tensor, norm: NormLayer | None, heads: int) -> Tensor:
        if norm is not None and not self.per_head:
            z = norm(z)
        z = z.unflatten(-1, (heads, -1))
        return norm(z) if norm is not None and self.per_head else z

    def values(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> v (B, T, K, Dv)."""
        return self.v_proj(x).unflatten(-1, (self.key_value_heads, -1))

    # --- n sequences at the same position, with room for ``length`` tokens each ---------------

    def with_room(self, state: LayerState, rows: int, seen: int, length: int) -> LayerState:
        """The state of one sequence after ``seen`` tokens as that of ``rows`` alike."""
        return {name: x.expand(rows, *x.shape[1:]) for name, x in state.items()}

    def step_in_room(
        self, x: Tensor, positions: Positions, state: LayerState, seen: int
    ) -> tuple[Tensor, LayerState]:
        """The token after ``seen`` others, x (n, 1, D) -> (n, 1, D), and the state after it."""
        mixed: tuple[Tensor, LayerState] = self(x, positions, state, None)
        return mixed

    def keep_rows(self, state: LayerState, rows: Tensor, seen: int) -> LayerState:
        """The state of these rows alone, (m,) indices in ascending order."""
        return {name: x[rows] for name, x in state.items()}


def continued(state: LayerState | None, positions: Positions) -> LayerState | None:
    """The state before, empty for rows that begin a document of their own."""
    if state is None or positions.goes_on is None:
        return state
    kept = dict(state)
    if "valid" in state:
        kept["valid"] = state["valid"] & positions.goes_on[:, None]
    if "state" in state:
        kept["state"] = state["state"] * positions.goes_on[:, None, None, None]
    return kept


def last_tokens(memory: LayerState, tokens: int, padded: bool) -> LayerState:
    """The last ``tokens`` tokens of every row; ``padded``: padding may stand among them."""
    if padded:
        # Padding moves to the front, from where it is dropped first.
        order = memory["valid"].byte().argsort(dim=1, stable=True)
        memory = {
            name: x.take_along_dim(order.view(*order.shape, *[1] * (x.ndim - 2)), dim=1)
            for name, x in memory.items()
        }
    dropped = max(0, memory["valid"].shape[1] - tokens)
    return {name: x[:, dropped:] for name, x in memory.items()}
