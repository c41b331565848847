"""What `generate` is asked for, checked before anything runs.

For `model`; everything else about transformers' arguments is transformers' own business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.configuration_utils import GenerationMode

from offramp.errors import InputError, ModelError
from offramp.llm.sequences import check_length
from offramp.llm.trunk import Trunk

_REFUSED = {
    "assistant_model": "exits take its place",
    "custom_generate": "offramp brings its own loop",
    "past_key_values": "offramp keeps its own cache",
    "cache": "offramp keeps its own cache",
    "inputs_embeds": "give input_ids",
    "position_ids": "positions follow from attention_mask",
    "negative_prompt_ids": "they are not supported",
    "token_type_ids": "tokens are embedded by themselves and their positions",
}
# Ways to keep keys and values that a user may ask transformers for.
_CACHES = ("cache_implementation", "cache_config", "max_cache_len", "compile_config", "prefill_chunk_size")
# What to leave out where transformers would take another way than greedy search or sampling.
_CULPRITS = {
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search (penalty_alpha)",
    GenerationMode.ASSISTED_GENERATION: "assisted generation (prompt_lookup_num_tokens, assistant_early_exit)",
    GenerationMode.DOLA_GENERATION: "DoLa (dola_layers)",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "constrained search (constraints, force_words_ids)",
}


def check_ids(trunk: Trunk, ids: torch.Tensor, what: str) -> None:
    """Refuse token ids outside the vocabulary.

    Raises
    ------
    InputError
        Naming the token.
    """
    outside = ids[(ids < 0) | (ids >= trunk.vocab_size)]
    if outside.numel():
        raise InputError(
            f"{what} holds token {int(outside[0])}, but the model's vocabulary has {trunk.vocab_size} "
            "tokens: use the model's own tokenizer"
        )


def check_share(audit: Any) -> float:
    """Return ``audit`` as a share, 0 for None, or say what is wrong with it.

    Raises
    ------
    InputError
        Saying what to give.
    """
    number = isinstance(audit, int | float) and not isinstance(audit, bool)
    if audit is not None and not (number and 0 <= audit <= 1):
        raise InputError(
            f"audit is {audit!r}: give the share of early tokens to check, from 0 to 1, such as 0.05"
        )
    return float(audit or 0)


def check_request(trunk: Trunk, ids: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse prompts, masks and arguments of `generate` that cannot be used.

    Raises
    ------
    InputError
        Naming the argument.
    ModelError
        If the model's layers are no longer those the exits were attached to.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise InputError(f"{name} cannot be used with exits: {reason}")
    if _asked(trunk.model, kwargs, "token_healing"):
        raise InputError("token_healing rewrites the prompt, which offramp continues as it is: leave it out")
    _check_cache(trunk, kwargs)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise InputError("input_ids is not a (batch, tokens) tensor of token ids with at least one token")
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise InputError(
            f"attention_mask is not a {tuple(ids.shape)} tensor: give one 0 or 1 for every token of input_ids"
        )
    if trunk.model.get_output_embeddings() is not trunk.output:
        raise ModelError(
            "model: its output layer was replaced after exits were attached, as resize_token_embeddings does; make "
            "a new EarlyExitModel"
        )
    if not trunk.is_intact:
        raise ModelError(
            "model: its layers were changed after exits were attached, as adding an adapter, quantising or a hook "
            "does; make a new EarlyExitModel"
        )
    check_ids(trunk, ids, "input_ids")
    check_length(ids.shape[1] + 1, trunk.max_positions, "input_ids")


def _check_cache(trunk: Trunk, kwargs: Mapping[str, Any]) -> None:
    """Refuse a kind of cache; one that the model itself brings (Gemma's is "hybrid") nobody has asked for."""
    config, brought = kwargs.get("generation_config"), trunk.model.generation_config
    for name in _CACHES:
        for asked in (kwargs.get(name), getattr(config, name, None)):
            if asked not in (None, "dynamic", getattr(brought, name, None)):
                raise InputError(
                    f"{name} is {asked!r}: offramp keeps keys and values in a cache of its own, which grows with the "
                    "text; leave it out"
                )


def take_stop_strings(model: Any, tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """Turn ``stop_strings``, wherever they are asked for, into one of the ``stopping_criteria``.

    transformers itself hands no tokenizer on to a loop that is not its own.

    Raises
    ------
    InputError
        Where there is no tokenizer to read them with.
    """
    tokenizer = kwargs.pop("tokenizer", None) or tokenizer
    strings = _asked(model, kwargs, "stop_strings")
    if strings is None:
        return
    if not strings:
        raise InputError("stop_strings is empty: give strings to stop at, or leave it out")
    if tokenizer is None:
        raise InputError("stop_strings need the model's tokenizer to be found: give it as tokenizer=")
    config: Any = kwargs.get("generation_config")
    if getattr(config, "stop_strings", None) and model.generation_config.stop_strings is None:
        # To say so beside a config is deprecated.
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
        kwargs.pop("stop_strings", None)
    else:
        kwargs["stop_strings"] = None
    given = kwargs.get("stopping_criteria") or ()
    # As in transformers a criterion of the user's own takes the place of one of its kind.
    if not any(type(criterion) is StopStringCriteria for criterion in given):
        kwargs["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])


def _asked(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Find a setting of `generate` where transformers does: given by name, in a config given, in the model's own."""
    if name in kwargs:
        return kwargs[name]
    found = getattr(kwargs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if found is None else found


def check_config(trunk: Trunk, config: GenerationConfig, mode: str) -> None:
    """Refuse ways to generate that exits do not know.

    Raises
    ------
    InputError
        Naming what to leave out.
    """
    way = config.get_generation_mode()
    if way not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        culprit = _CULPRITS.get(way, "beam search (num_beams)")
        raise InputError(
            f"generate: {culprit} does not work with exits; leave it out, for greedy search or sampling"
        )
    if config.output_attentions or config.output_hidden_states:
        raise InputError(
            "output_attentions and output_hidden_states are not kept with exits, whose layers run at different "
            "steps: leave them out"
        )
    if mode == "verify" and (config.output_scores or config.output_logits):
        raise InputError("output_scores and output_logits are not kept in verify mode: leave them out")
    if mode != "off":
        _check_processors(config)
    check_length(config.max_length, trunk.max_positions, "generate")


def _check_processors(config: GenerationConfig) -> None:
    # These remember what they were called with, and are called again where a draft is judged or a head has no token.
    stateful = {
        "guidance_scale": config.guidance_scale not in (None, 1),
        "SynthID watermarking": isinstance(config.watermarking_config, SynthIDTextWatermarkingConfig),
    }
    for name, asked in stateful.items():
        if asked:
            raise InputError(f"{name} cannot be used with exits: leave it out, or use mode='off'")
