"""What transformers asks of a model: its configuration, its cache, its layers, ``generate``.

It is the last part of the file that is put together for stock transformers, and computes nothing
by itself: the spec and the torch backend's modules do.

Shapes: ids (B, T); hidden states (B, T, D).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from supra_core.artifact.config import FORMAT_VERSION, SPEC_FIELDS, config_to_spec
from supra_core.errors import SupraError
from supra_core.mixers import FLOAT32_TENSORS
from supra_core.model.spec import ModelSpec
from supra_torch.model.layers import Exact, NormLayer, Positions
from supra_torch.model.mixers.base import LayerState, MixerModule
from supra_torch.model.trunk import Computation, Layer, ModelState, Trunk, frequencies

# What else a folder holds for supra and mlx-lm; a copy of the model gets copies of it.
_COMPANIONS = ("original.safetensors",)
_CHECKSUMS = "SHA256SUMS"
# What a config states of the model beside the spec's fields.
_STATED = (
    *SPEC_FIELDS, "model_type", "format_version", "mixers", "layer_mixers", "layer_feed_forwards",
    "num_hidden_layers", "layer_types",
)  # fmt: skip
# transformers makes a config without arguments to compare others with.
_SMALLEST: dict[str, Any] = {
    "format_version": FORMAT_VERSION, "vocab_size": 1, "hidden_size": 2, "intermediate_size": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "value_head_dim": 2,
    "mixers": [{"kind": "softmax_attention"}], "layer_mixers": [0],
}  # fmt: skip


class SupraConfig(PreTrainedConfig):
    """All that a supra model's ``config.json`` states, as attributes of the same names.

    Raises ValueError, when it is made, for what is missing, wrong, or contradicts itself.
    """

    model_type = "supra"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **stated: Any) -> None:
        if stated.get("quantization") is not None:
            raise ValueError(
                "config.json: field quantization says that the weights are packed for MLX, which "
                "transformers does not read: convert the model again without --quantize"
            )
        if not any(name in stated for name in _SMALLEST):
            stated = {**_SMALLEST, **stated}
        for name in _STATED:
            if name in stated:
                setattr(self, name, stated.pop(name))
        spec = self.spec()
        # For transformers, which looks for them.
        self.num_hidden_layers = spec.num_hidden_layers
        self.layer_types = [layer.mixer.layer_type for layer in spec.layers]
        self.use_cache = stated.pop("use_cache", True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(self, name, None))
        super().__init__(**stated)

    def spec(self) -> ModelSpec:
        """The spec that the fields state now."""
        stated = {name: getattr(self, name) for name in _STATED if hasattr(self, name)}
        try:
            return config_to_spec(stated, "config.json")
        except SupraError as error:
            raise ValueError(str(error)) from None

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **more: Any) -> None:
        """As transformers', with the files beside it that supra and mlx-lm read."""
        source, out = Path(self._name_or_path), Path(save_directory)
        model_file = Path(getattr(self, "model_file", None) or "").name
        out.mkdir(parents=True, exist_ok=True)
        for name in (*_COMPANIONS, *([model_file] if model_file else [])):
            if (source / name).is_file() and source.resolve() != out.resolve():
                shutil.copyfile(source / name, out / name)
        # They would no longer be those of the files.
        (out / _CHECKSUMS).unlink(missing_ok=True)
        if model_file and not (out / model_file).is_file():
            # Naming a file that is not there would keep mlx-lm from loading the rest.
            del self.model_file
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **more)


class SupraCache(Cache):
    """The states of a batch of sequences, for ``past_key_values``.

    ``memory``: each layer's named tensors, batch first. Linear layers' are of one size whatever
    the number of tokens, softmax layers' without a window grow with it. ``seen``: columns of
    ``input_ids`` so far, padding included; ``tokens`` (B,): those that were no padding.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.memory: list[LayerState] = [{} for _ in range(layers)]
        self.seen = 0
        self.tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.memory)

    def __repr__(self) -> str:
        return f"SupraCache(layers={len(self.memory)}, seen={self.seen})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, as transformers counts them."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns seen, as transformers counts them."""
        return self.seen

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Columns after ``query_length`` more, and the offset of the first."""
        return self.seen + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no longest sequence."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before the first."""
        return -1 if self.tokens is None else len(self.tokens)

    @property
    def is_initialized(self) -> bool:
        return self.tokens is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """As before the first token."""
        self.memory = [{} for _ in self.memory]
        self.seen, self.tokens = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each row becomes a copy of the row that ``beam_idx`` (B,) names."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` name."""
        self._each_row(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memory = [{name: change(x) for name, x in layer.items()} for layer in self.memory]
        self.tokens = None if self.tokens is None else change(self.tokens)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "a recurrent state cannot forget its last tokens or take keys and values from outside: "
            "use greedy search, sampling or beam search, and copy.deepcopy(past_key_values) where "
            "several continuations begin at one prompt"
        )

    crop = update = update_conv_state = update_recurrent_state = _refuse
    activate_past_recording = early_initialization = _refuse


class SupraLayer(GradientCheckpointingLayer, Layer):
    """A layer that finds its state in the cache, and leaves the new one there."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__(spec, index)
        self.index = index

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        positions: Positions,
        mask: Tensor | None = None,
        past_key_values: SupraCache | None = None,
    ) -> Tensor:
        """h (B, T, D) -> (B, T, D)."""
        cache = past_key_values
        state = None if cache is None else cache.memory[self.index] or None
        h, memory = Layer.forward(self, h, positions, state, mask, remember=cache is not None)
        if cache is not None:
            if not self.self_attn.mixer.memory_grows:
                # Copied, so that the memory of what lies before them is given back.
                memory = {name: x.clone() for name, x in memory.items()}
            cache.memory[self.index] = memory
        return h


def _is_initialised(parameter: Tensor) -> bool:
    """Whether transformers has loaded or drawn a parameter."""
    return getattr(parameter, "_is_hf_initialized", False)


class SupraPreTrainedModel(PreTrainedModel):
    """What all supra models share for transformers."""

    config_class = SupraConfig
    config: SupraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SupraLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = list(FLOAT32_TENSORS)
    # Softmax layers are computed by torch's own attention; there is no other implementation.
    _supports_sdpa = True
    # A state cannot be set back by some tokens, as assisted decoding needs it.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The model makes its own cache."""
        return False

    @classmethod
    def from_pretrained(cls, *given: Any, output_loading_info: bool = False, **more: Any) -> Any:
        """As transformers', but tensors that are missing or unexpected are an error.

        A model with a random tensor, or one ignored, would compute something else.
        """
        loaded: Any = super().from_pretrained(*given, output_loading_info=True, **more)
        model, info = loaded
        wrong = {
            "missing": list(info["missing_keys"]),
            # The trunk alone has no head.
            "unexpected": [name for name in info["unexpected_keys"] if name != "lm_head.weight"],
        }
        for problem, names in wrong.items():
            if names:
                raise ValueError(
                    f"the weights do not match config.json: {', '.join(sorted(names)[:4])} "
                    f"({len(names)} in all) {problem}; get the folder again or convert it again"
                )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """For a model that is trained from scratch; a folder's weights are all stored."""
        super()._init_weights(module)
        if isinstance(module, NormLayer):
            init.constant_(module.weight, 1.0 - module.norm.weight_offset)
        elif isinstance(module, MixerModule):
            left = {n: p for n, p in module.named_parameters() if not _is_initialised(p)}
            generator = np.random.default_rng(int(torch.randint(2**31, ())))
            spec = self.config.spec()
            for name, shape in module.mixer.new_tensors(spec).items() if left else ():
                # A projection's bias is initialised with its weight.
                if name in left and "_proj." not in name:
                    initial = module.mixer.initial(name, shape, spec, generator)
                    init.copy_(left[name], torch.from_numpy(initial))

    def _initialize_weights(self, module: nn.Module, *others: Any, **more: Any) -> None:
        """As for transformers' own code: what is loaded is told by each parameter's own mark."""
        super()._initialize_weights(module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SupraPreTrainedModel:
        """Casts of the whole model leave the type of the float32 tensors."""
        before = {
            name: parameter.data
            for name, parameter in self.named_parameters()
            if name.endswith(FLOAT32_TENSORS)
        }
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != torch.float32 and parameter.dtype.is_floating_point:
                parameter.data = data.float().to(parameter.device)
        return self


class SupraModel(Computation, SupraPreTrainedModel):
    """Embedding, layers and the last norm."""

    embed_tokens: nn.Embedding
    embed_norm: NormLayer | None
    layers: nn.ModuleList
    norm: NormLayer

    def __init__(self, config: SupraConfig) -> None:
        super().__init__(config)
        self.spec = spec = config.spec()
        trunk = Trunk(spec, SupraLayer)
        for name in ("embed_tokens", "embed_norm", "layers", "norm"):
            setattr(self, name, getattr(trunk, name))
        self.frequencies = nn.ModuleDict(frequencies(spec))
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, Exact):
                # transformers would give a buffer that is not stored other numbers.
                module.values = module._buffers.pop("values")  # type: ignore[assignment]
        self.post_init()

    @property
    def trunk(self) -> Any:
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SupraCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Hidden states (B, T, D) of input_ids (B, T), or of their embeddings.

        ``attention_mask`` (B, T), or (B, past + T) of which the last T columns count: 0 for
        padding, on any side. ``past_key_values``: what an earlier call returned; it is changed.
        ``hidden_states``: what enters each layer, and the result. Raises ValueError for what the
        model does not compute: attention weights, masks of other shapes, packed positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("linear attention makes no attention weights: leave output_attentions")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointing = self.gradient_checkpointing and self.training
        cache = self._cache(past_key_values, use_cache, h.shape[0], checkpointing)
        mask = self._new_tokens(attention_mask, h.shape[1], 0 if cache is None else cache.seen)
        seen = None if cache is None or cache.tokens is None else ModelState(cache.tokens, ())
        positions = self.positions(h[..., 0], seen, mask)
        if position_ids is not None:
            self._check_positions(position_ids, positions.positions, mask)
        h = self.scaled(h)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        entered: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                entered += (h,)
            h = layer(h, positions, mask=mask, past_key_values=cache)
        h = self.norm(h)
        if cache is not None:
            cache.seen += h.shape[1]
            new = h.new_full(h.shape[:1], h.shape[1], dtype=torch.long)
            new = new if mask is None else mask.long().sum(1)
            cache.tokens = new if cache.tokens is None else cache.tokens + new
        output = BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=(*entered, h) if output_hidden_states else None,
        )
        return output if self._as_dictionary(return_dict) else output.to_tuple()

    def _as_dictionary(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _cache(
        self, given: Any, use_cache: bool | None, batch: int, checkpointing: bool
    ) -> SupraCache | None:
        if given is not None and not isinstance(given, SupraCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}, but a supra model goes on from what "
                "it returned itself: leave it out at the first call"
            )
        if given is not None and given.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values holds {given.batch_size} sequences, but {batch} go on: call its "
                "batch_repeat_interleave or batch_select_indices"
            )
        if checkpointing:
            if given is not None and given.seen:
                raise ValueError("gradient checkpointing cannot go on from past_key_values")
            return None
        if given is not None:
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return SupraCache(len(self.layers)) if use_cache else None

    @staticmethod
    def _new_tokens(attention_mask: Tensor | None, T: int, past: int) -> Tensor | None:
        """Which of the new tokens are no padding, (B, T) bool; None if all are."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (T, past + T):
            raise ValueError(
                f"attention_mask must have a column for each of {T} tokens, or of {past} + {T} "
                f"with those before them, not the shape {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, -T:] != 0
        return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask

    @staticmethod
    def _check_positions(given: Tensor, places: Tensor, mask: Tensor | None) -> None:
        given, places = torch.broadcast_tensors(given, places)
        differs = given != places
        if mask is not None:
            differs = differs & mask
        if bool(differs.any()):
            raise ValueError(
                "position_ids differ from the tokens' places, which a recurrent model follows: "
                "leave them out, and pad sequences instead of packing them"
            )


class SupraForCausalLM(SupraPreTrainedModel, GenerationMixin):
    """The model with its head: logits, loss, and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SupraConfig) -> None:
        super().__init__(config)
        self.model = SupraModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SupraCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> Any:
        """Logits (B, T, V), else as :meth:`SupraModel.forward`.

        ``labels`` (B, T): the tokens themselves, -100 where none counts; the loss is the mean of
        the next ones' in nats. ``logits_to_keep``: for how many of the last tokens, 0 for all.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        h = found.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = h[:, kept]
        divisor = self.model.spec.logits_divisor
        logits = self.model.capped(self.lm_head(h if divisor == 1.0 else h / divisor))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **more
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )
        return output if self.model._as_dictionary(return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', without positions: the model counts tokens itself."""
        prepare: Any = GenerationMixin.prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(self, input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


__all__ = ["SupraCache", "SupraConfig", "SupraForCausalLM", "SupraModel", "SupraPreTrainedModel"]
