"""`HamForCausalLM`: a `DecoderLM` with the methods that tools around transformers call."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from ham.errors import ConfigError, CorruptFileError
from ham.hf.cache import HamCache, Scattered, real_spans, rows_by_length
from ham.hf.configuration import HamConfig
from ham.hf.source import check_model_source
from ham.model.decoder import DecoderLM
from ham.model.finite import check_finite
from ham.model.model_config import ModelConfig


class HamForCausalLM(PreTrainedModel, GenerationMixin):
    """Any architecture of this project behind the interface of transformers.

    Training with it works, but the thresholds of routing layers move only when
    `model.decoder.end_step()` is called after each optimiser step.

    Args:
        config: The configuration; `decoder` is built from it with random weights.

    Raises:
        ConfigError: For a configuration that names no valid model.
    """

    config_class = HamConfig
    # The output projection reads the embedding itself: there is no second tensor to tie.
    _tied_weights_keys = None
    _is_stateful = True

    def __init__(self, config: HamConfig):
        super().__init__(config)
        self.decoder = _build_decoder(config.model_config())
        self.post_init()

    @classmethod
    def from_decoder(
        cls, decoder: DecoderLM, end_of_text: int | None = None, facts: dict | None = None
    ) -> HamForCausalLM:
        """Wrap a model; it is shared, not copied."""
        config = HamConfig.from_model_config(decoder.config, end_of_text, facts)
        with torch.device("meta"):
            model = cls(config)
        model.decoder = decoder
        return model.train(decoder.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, from safetensors only; every weight must be there and fit.

        Raises:
            MissingDataError: If the folder holds no model.
            ConfigError: If it holds another kind of model, or pickles only.
            CorruptFileError: If its weights cannot be read or do not fit its configuration.
        """
        check_model_source(pretrained_model_name_or_path, kwargs)
        wants_report = kwargs.pop("output_loading_info", False)
        safe = {"use_safetensors": True, "weights_only": True, "output_loading_info": True}
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, **{**kwargs, **safe}
        )
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[fault]:
                raise CorruptFileError(
                    f"the weights of {pretrained_model_name_or_path} do not fit its config.json: "
                    f"{fault.replace('_', ' ')} {sorted(map(str, report[fault]))[:3]}"
                )
        return (model, report) if wants_report else model

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HamCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position.

        Args:
            input_ids: Int64 token ids, batch by time.
            attention_mask: Ones at tokens and zeros at padding before or after them, batch by
                time; the columns in the cache may be included. Padding is never read.
            cache: What was read before; it is updated. No gradient passes through it.
            labels: Int64 token ids as `input_ids`, -100 where not scored; shifted here. Padding is
                not scored.
            use_cache: Make a cache if none is given.
            logits_to_keep: Return only the last so many positions (0: all), or these positions.
            num_items_in_batch: Divide the summed loss by this instead of taking the mean.

        Returns:
            `logits` (zero at padding), `loss` in nats per token, `cache`.

        Raises:
            ConfigError: For a mask that does not fit or a sequence beyond the position range.
            RoutingError, NotFiniteError: If routing scores or logits are not finite, in evaluation
                mode; in training the loss tells.
        """
        if input_ids is None or input_ids.ndim != 2:
            received = None if input_ids is None else tuple(input_ids.shape)
            raise ConfigError(f"input_ids must be batch by time, received shape {received}")
        cache = HamCache() if use_cache and cache is None else _our_cache(cache)
        mask_BT = _new_columns(attention_mask, input_ids, 0 if cache is None else cache.columns)
        if cache is None:
            logits_BTV, extra_loss = self._read(input_ids, mask_BT)
        else:
            rows, length = input_ids.shape
            spans = [(0, length)] * rows if mask_BT is None else real_spans(mask_BT)
            logits_BTV, extra_loss = cache.advance(self.decoder, input_ids, spans), None
        kept = _kept(logits_BTV, logits_to_keep)
        if not self.training and not torch.compiler.is_compiling():
            check_finite(self.decoder, kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV,
                labels=_scored(labels, mask_BT),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            loss = loss if extra_loss is None else loss + extra_loss
        return CausalLMOutputWithPast(loss=loss, logits=kept, cache=cache)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, whose rows are the vocabulary rounded up."""
        return self.decoder.embedding

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse: the vocabulary belongs to the configuration of the decoder.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"the vocabulary of this model, {self.config.vocab_size} tokens, cannot be resized"
        )

    def _read(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Whole sequences in parallel; `logits_BTV` and the auxiliary loss."""
        if mask_BT is None or bool(mask_BT.all()):
            output = self.decoder(tokens_BT)
            return output.logits_BTV, _auxiliary_loss(output.aux)
        spans = real_spans(mask_BT)
        scattered = Scattered(tokens_BT)
        real, extra = sum(length for _, length in spans), None
        for rows in rows_by_length(range(len(spans)), spans):
            if spans[rows[0]][1] == 0:
                continue
            tokens_RT = scattered.gather(rows, spans)
            output = self.decoder(tokens_RT)
            scattered.put(output.logits_BTV)
            loss = _auxiliary_loss(output.aux)
            if loss is not None:
                share = tokens_RT.numel() / real
                extra = share * loss if extra is None else extra + share * loss
        return scattered.logits(self.decoder), extra

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill tables that are not stored; weights are drawn by the decoder or read from a file."""
        if hasattr(module, "fill_tables"):
            module.fill_tables()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Called once by `generate`, with the prompts in their final form."""
        max_columns = args[-1]
        self._check_prompts(model_kwargs.get("attention_mask"), max_columns)
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"cache_implementation {generation_config.cache_implementation!r}: "
                "this model brings its own decoding memory; leave it unset"
            )
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = HamCache(**_cache_options(generation_config.cache_config))

    def _check_prompts(self, mask_BT: Tensor | None, max_columns: int) -> None:
        padding = 0
        if mask_BT is not None:
            if not bool(mask_BT[:, -1].all()):
                raise ConfigError(
                    "generation continues the last column, which is padding in some rows; "
                    "pad on the left (tokenizer.padding_side = 'left')"
                )
            padding = int((mask_BT == 0).sum(dim=1).min())
        limit = self.config.max_position_embeddings
        longest = max_columns - padding
        if longest > limit:
            # The last token made is not read.
            raise ConfigError(
                f"prompt and new tokens make {longest + 1} tokens; this model reads up to "
                f"{limit} (max_positions) and makes one more"
            )


def _cache_options(given: dict[str, Any] | None) -> dict[str, Any]:
    """The `cache_config` of a generation, which bounds the cache."""
    unknown = sorted(set(given or {}) - {"cache_bytes"})
    if unknown:
        raise ConfigError(f"cache_config has {unknown[0]!r}; legal: 'cache_bytes'")
    return dict(given or {})


def _build_decoder(config: ModelConfig) -> DecoderLM:
    """Weights in torch's default dtype, buffers as the layers define them.

    A threshold rounded to bfloat16 would route another share of the tokens.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        decoder = DecoderLM(config)
    finally:
        torch.set_default_dtype(dtype)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(dtype)
    return decoder


def _our_cache(cache: Cache | None) -> HamCache | None:
    if cache is not None and not isinstance(cache, HamCache):
        raise ConfigError(f"this model continues a HamCache, received {type(cache).__name__}")
    return cache


def _new_columns(mask: Tensor | None, tokens_BT: Tensor, past: int) -> Tensor | None:
    """The part of a mask that belongs to `tokens_BT`."""
    if mask is None:
        return None
    rows, length = tokens_BT.shape
    if mask.shape not in ((rows, past + length), (rows, length)):
        raise ConfigError(
            f"attention_mask has shape {tuple(mask.shape)}; legal for input_ids of shape "
            f"{tuple(tokens_BT.shape)} after {past} tokens: ({rows}, {past + length})"
        )
    return mask[:, -length:]


def _scored(labels_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Labels without those that are padding or would be predicted from padding."""
    if mask_BT is None:
        return labels_BT
    real_BT = mask_BT != 0
    predicted_BT = real_BT.clone()
    predicted_BT[:, 1:] &= real_BT[:, :-1]
    return labels_BT.masked_fill(~predicted_BT, -100)


def _kept(logits_BTV: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return logits_BTV[:, keep]
    return logits_BTV[:, -keep:] if keep else logits_BTV


def _auxiliary_loss(aux: list[Any]) -> Tensor | None:
    losses = [report.loss for report in aux if report.loss is not None]
    return sum(losses[1:], losses[0]) if losses else None
