"""A reader of artifacts that was written from docs/formats.md and uses nothing of supra."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in float64."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for content in ((folder / name).read_bytes() for name in names):
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                raw = data[slice(*entry["data_offsets"])]
                if entry["dtype"] == "BF16":
                    array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
                else:
                    array = np.frombuffer(raw, TYPES[entry["dtype"]])
                tensors[name] = array.reshape(entry["shape"]).astype(np.float64)
    return tensors


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


class Model:
    """A folder's model: ``logits(ids)`` of one sequence, (T,) -> (T, V)."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors = read_tensors(folder)
        self.H, self.K = (self.config[f"num_{x}_heads"] for x in ("attention", "key_value"))

    def logits(self, ids: list[int]) -> np.ndarray:
        c, t = self.config, self.tensors
        h = t["model.embed_tokens.weight"][ids] * c.get("embedding_scale", 1.0)
        if c.get("embedding_norm"):
            h = self.norm(h, "model.embed_norm.weight")
        for number, mixer in enumerate(c["layer_mixers"]):
            at = f"model.layers.{number}."
            u = self.before(h, at + "input_layernorm.weight")
            mixed = self.mix(at + "self_attn.", c["mixers"][mixer], u)
            h = h + self.after(mixed, at + "mixer_output_norm.weight")
            u = self.before(h, at + "post_attention_layernorm.weight")
            kind = c.get("layer_feed_forwards", ["dense"] * len(c["layer_mixers"]))[number]
            added = self.mixture(at, u) if kind == "experts" else self.ffn(at + "mlp.", u)
            h = h + self.after(added, at + "mlp_output_norm.weight")
        head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
        logits = self.norm(h, "model.norm.weight") @ t[head + ".weight"].T
        return capped(logits / c.get("logits_divisor", 1.0), c.get("logits_softcap"))

    def ffn(self, at: str, u: np.ndarray) -> np.ndarray:
        gate, up = (self.linear(f"{at}{name}_proj", u) for name in ("gate", "up"))
        if self.config.get("hidden_act", "silu") == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return self.linear(at + "down_proj", gate * up)

    def mixture(self, at: str, u: np.ndarray) -> np.ndarray:
        experts = self.config["experts"]
        p = softmax(u @ self.tensors[at + "mlp.gate.weight"].T)
        # Every expert of every token, and then nothing of those that were not chosen.
        least = np.sort(p, -1)[:, -experts["per_token"], None]
        p = np.where(p >= least, p, 0.0)
        if experts.get("normalise", True):
            p = p / p.sum(-1, keepdims=True)
        each = [self.ffn(f"{at}mlp.experts.{m}.", u) for m in range(experts["count"])]
        return np.einsum("tm,mtd->td", p, np.stack(each))

    def before(self, z: np.ndarray, name: str) -> np.ndarray:
        return z if self.config.get("block_norm") == "after" else self.norm(z, name)

    def after(self, z: np.ndarray, name: str) -> np.ndarray:
        z = z if self.config.get("block_norm", "before") == "before" else self.norm(z, name)
        return self.config.get("residual_scale", 1.0) * z

    def norm(self, z: np.ndarray, name: str) -> np.ndarray:
        norm = self.config.get("norm", {})
        if norm.get("kind") == "layer_norm":
            z = z - z.mean(-1, keepdims=True)
        z = z / np.sqrt((z**2).mean(-1, keepdims=True) + norm.get("eps", 1e-5))
        return z * (self.tensors[name] + norm.get("weight_offset", 0.0))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0.0)

    def rotate(self, z: np.ndarray, which: str | None = None) -> np.ndarray:
        rope = self.config.get("local_rope" if which == "local" else "rope", {})
        c = int(z.shape[-1] * rope.get("fraction", 1.0))
        theta = rope.get("base", 10000.0) ** (-2 * np.arange(c // 2) / c)
        scaling = rope.get("scaling") or {"kind": "none"}
        if scaling["kind"] == "linear":
            theta = theta / scaling["factor"]
        elif scaling["kind"] == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * theta / (2 * np.pi)
            s = np.clip((turns - low) / (high - low), 0, 1)
            theta = (1 - s) * theta / scaling["factor"] + s * theta
        elif scaling["kind"] == "yarn":
            n, r = scaling["original_max_position_embeddings"], c // 2
            low, high = (
                r * np.log(n / (2 * np.pi * beta)) / np.log(rope.get("base", 10000.0))
                for beta in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
            )
            if scaling.get("truncate", True):
                low, high = np.floor(low), np.ceil(high)
            low, high = max(low, 0), min(high, c - 1)
            s = np.clip((np.arange(r) - low) / (high - low if high != low else 0.001), 0, 1)
            theta = s * theta / scaling["factor"] + (1 - s) * theta
        elif scaling["kind"] == "longrope":
            theta = theta / np.array(scaling[scaling.get("factors", "short") + "_factor"])
        angle = np.arange(len(z))[:, None, None] * theta
        if rope.get("pairing", "half") == "half":
            first, second = slice(0, c // 2), slice(c // 2, c)
        else:
            first, second = slice(0, c, 2), slice(1, c, 2)
        a, b, out = z[..., first], z[..., second], z.copy()
        by = scaling.get("attention_factor", 1.0)
        out[..., first] = by * (a * np.cos(angle) - b * np.sin(angle))
        out[..., second] = by * (b * np.cos(angle) + a * np.sin(angle))
        return out

    def mix(self, at: str, mixer: dict[str, Any], u: np.ndarray) -> np.ndarray:
        T, heads = len(u), {"q": self.H, "k": self.K, "v": self.K}
        q, k, v = (self.linear(f"{at}{x}_proj", u).reshape(T, heads[x], -1) for x in "qkv")
        distance = np.arange(T)[:, None] - np.arange(T)
        if mixer.get("feature_map", {}).get("projection", {}).get("kind") != "folded":
            q, k = self.query_key_norm(at, q, k)
        if mixer["kind"] != "linear_attention":
            seen = (distance >= 0) & (distance < (mixer.get("window") or T))
            if mixer["kind"] == "window_attention":
                seen |= (distance >= 0) & (np.arange(T) < mixer.get("sinks", 4))
            rope = mixer.get("rope", mixer.get("rotary"))
            if rope != "none":
                q, k = (self.rotate(z, rope) for z in (q, k))
            k, v = self.repeated(k), self.repeated(v)
            scores = np.einsum("thd,jhd->htj", q, k) / np.sqrt(q.shape[-1])
            scores = capped(scores, self.config.get("attention_softcap"))
            out = np.einsum("htj,jhv->thv", softmax(np.where(seen, scores, -np.inf)), v)
        else:
            out = self.linear_attention(at, mixer, q, k, v, distance)
        return self.linear(at + "o_proj", out.reshape(T, -1))

    def query_key_norm(
        self, at: str, q: np.ndarray, k: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        kind, scale = self.config.get("query_key_norm", "none"), self.config.get("attention_scale")
        if kind != "none":
            q, k = (
                self.norm(
                    z if kind == "per_head" else z.reshape(len(z), -1), f"{at}{x}_proj_norm.weight"
                ).reshape(z.shape)
                for x, z in (("q", q), ("k", k))
            )
        return q if scale is None else q * (scale * np.sqrt(q.shape[-1])), k

    def repeated(self, x: np.ndarray) -> np.ndarray:
        return x if x.shape[1] == self.H else np.repeat(x, self.H // self.K, axis=1)

    def linear_attention(
        self, at: str, mixer: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray,
        distance: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        t, window = self.tensors, mixer.get("window")
        shared = mixer["feature_map"]["projection"].get("shared", False)
        z_q = self.projected(at + "q_feature", mixer, q)
        z_k = self.projected(at + ("q_feature" if shared else "k_feature"), mixer, k)
        phi_q, phi_k = (activate(mixer["feature_map"]["activation"], z) for z in (z_q, z_k))
        phi_k, v, z_k = (self.repeated(x) for x in (phi_k, v, z_k))
        if mixer.get("qk_norm"):
            phi_q, phi_k = (
                self.norm(z.reshape(len(z), -1), f"{at}{x}_norm.weight").reshape(z.shape)
                for x, z in (("q", phi_q), ("k", phi_k))
            )
        if mixer["rope"] == "after":
            phi_q, phi_k = (self.rotate(z, mixer.get("rotary")) for z in (phi_q, phi_k))
        phi_k = phi_k * mixer.get("key_scale", 1.0)
        steps = np.maximum(distance - (window or 0), 0)
        weights = np.einsum("thd,jhd->htj", phi_q, phi_k)
        weights = weights * self.gamma(at, mixer["decay"])[:, None, None] ** steps
        sink = np.exp(t[at + "log_sink"])[:, None] if at + "log_sink" in t else 0.0
        if window:
            far = np.exp(t[at + "log_far_gain"])[:, None, None] * weights * (distance >= window)
            near = np.exp(np.einsum("thd,jhd->htj", z_q, z_k) / np.sqrt(z_q.shape[-1]))
            weights = near * ((distance >= 0) & (distance < window)) + far
            sink = sink * (far.sum(-1) > 0)
        else:
            weights = weights * (distance >= 0)
        out = np.einsum("htj,jhv->thv", weights, v)
        if mixer["normaliser"]["kind"] == "sum":
            total = (weights.sum(-1) + sink).T[..., None]
            out = out / np.where(total == 0, 1.0, total)
        else:
            out = out - out.mean(-1, keepdims=True)
            eps = mixer["normaliser"].get("eps", 1e-5)
            out = out / np.sqrt((out**2).mean(-1, keepdims=True) + eps)
        if mixer.get("gain", "none") != "none":
            out = out * t[at + "gain"].reshape(self.H, -1)
        return out

    def projected(self, name: str, mixer: dict[str, Any], z: np.ndarray) -> np.ndarray:
        phi = mixer["feature_map"]
        z = self.rotate(z, mixer.get("rotary")) if mixer["rope"] == "before" else z
        if phi["projection"]["kind"] == "projection":
            if phi["projection"]["scope"] == "all_heads":
                z = z.reshape(len(z), -1) @ self.tensors[name + ".weight"].T
            else:
                z = np.einsum("thd,hsd->ths", z, self.tensors[name + ".weight"])
            z = (z + self.tensors.get(name + ".bias", 0.0)).reshape(len(z), -1, phi["size"])
        return self.rotate(z, mixer.get("rotary")) if mixer["rope"] == "between" else z

    def gamma(self, at: str, decay: dict[str, Any]) -> np.ndarray:
        H, h = self.H, np.arange(self.H)
        if decay["kind"] == "none":
            return np.ones(H)
        if decay["kind"] == "retnet":
            return 1 - 2.0 ** (-5 - h)
        if decay["kind"] == "learned":
            return np.exp(-np.exp(self.tensors[at + "log_slope"]))
        if decay.get("start") is not None:
            return np.exp(-decay["start"] * 2.0 ** (-8 * h / H))
        slopes = lambda n: 2.0 ** (-8 * np.arange(1, n + 1) / n)  # noqa: E731
        P = 2 ** (H.bit_length() - 1)
        return np.exp(-(slopes(H) if P == H else np.append(slopes(P), slopes(2 * P)[::2][: H - P])))


def activate(name: str, z: np.ndarray) -> np.ndarray:
    if name == "none":
        return z
    if name == "signed_softmax":
        return np.concatenate([softmax(z), softmax(-z)], axis=-1)
    both = [np.maximum(z, 0), np.maximum(-z, 0)]
    return both[0] if name == "relu" else np.concatenate(both, axis=-1)
