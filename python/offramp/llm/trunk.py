"""A decoder in segments: the frozen model's own layers, run a few at a time on hidden states.

The one place that knows how a Hugging Face decoder is put together; everything in `offramp.llm` may import it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from offramp.errors import InputError, ModelError
from offramp.llm import lean
from offramp.llm.cache import GrowingCache, cache_argument
from offramp.llm.layer import LeanLayer
from offramp.llm.products import linear
from offramp.llm.shadow import Call, Shadow
from offramp.llm.stepping import Steps

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_KINDS_OF_ATTENTION = ("full_attention", "sliding_attention")
# Largest deviation from the model's own forward, relative to the largest hidden value, that rounding explains.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# What modules raise that are called in a way they were not written for.
_UNFIT = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


class Trunk:
    """A causal language model seen as embedding, decoder layers, final norm and output matrix.

    The model is never modified: the trunk only calls its modules.

    Parameters
    ----------
    model
        A Hugging Face causal language model: a stack of attention layers that pass hidden states on and keep keys and
        values in a cache, then a norm and an output matrix.

    Raises
    ------
    ModelError
        If the model is built in another way; the sentence names what is missing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        parts = _take_apart(model)
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.layers: Sequence[nn.Module] = list(parts.layers)
        self.norm: nn.Module = parts.norm
        self.output = cast(nn.Linear, model.get_output_embeddings())
        self.logit_factor, self.logit_cap = _logit_transform(self.config)
        self._decoder, self._layers_name = parts.decoder, parts.layers_name
        self._shadow = Shadow(parts.decoder, parts.layers_name)
        self._plain_embedding = False
        self._deviation = 0.0
        self._lean = lean.describe(self.layers, parts.decoder, self.config)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, H."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the output matrix, V."""
        return int(self.output.weight.shape[0])

    @property
    def max_positions(self) -> int:
        """Longest sequence the model was built for, in tokens.

        Where the angles of all positions change once a text outgrows a first length (``longrope``), that length:
        keys and values of the positions before it would have to be computed anew.
        """
        longest = getattr(self.config, "max_position_embeddings", None) or torch.iinfo(torch.int64).max
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            first = getattr(self.config, "original_max_position_embeddings", None)
            longest = rope.get("original_max_position_embeddings") or first or longest
        return int(longest)

    @property
    def forgets(self) -> bool:
        """Whether some layer attends to the newest positions only."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return any(kind != "full_attention" for kind in kinds)
        local = "local" in (getattr(self.config, "attention_layers", None) or ())
        return local or getattr(self.config, "sliding_window", None) is not None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.output.weight.dtype

    def new_cache(self) -> GrowingCache:
        """Give an empty cache for this model."""
        # It begins a sequence, in the midst of which weights do not change.
        if self._lean is not None:
            self._lean.begin()
        return GrowingCache(self.num_layers)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, H) before the first layer for token ids and their positions (B, T)."""
        if self._plain_embedding:
            hidden: torch.Tensor = self.model.get_input_embeddings()(tokens)
            return hidden
        return self._shadow.embed(tokens, positions)

    def run(
        self,
        hidden: torch.Tensor,
        first: int,
        last: int,
        *,
        cache: GrowingCache,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run layers ``first`` to ``last - 1`` over new rows, appending their keys and values to the cache.

        Parameters
        ----------
        hidden : (B, q, H)
            The input of layer ``first`` for the next q positions of its cache.
        first, last
            Half-open range of layers; all of them must have the same length in ``cache``.
        positions : (B, q) int64
            Rotary positions of the rows.
        attention_mask : (B, at least cached + q), optional
            1 for tokens, 0 for left padding.  ``None`` where nothing is padded.

        Returns
        -------
        torch.Tensor
            (B, q, H): the output of layer ``last - 1``.
        """
        if self._lean is not None and self._lean.pays(hidden, cache.length(first)):
            return self._lean.run_own(hidden, first, last, cache, positions, attention_mask)
        return self._run_modules(hidden, first, last, cache, positions, attention_mask)

    def _run_modules(
        self,
        hidden: torch.Tensor,
        first: int,
        last: int,
        cache: GrowingCache,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        seen = cache.length(first)
        if attention_mask is not None:
            attention_mask = attention_mask[:, : seen + hidden.shape[1]]
        # Asked anew for every segment: their caches may differ in length.
        calls = self.calls(hidden, positions, attention_mask, seen)
        for index in range(first, last):
            hidden = calls[index].on(self.layers[index], hidden, cache)
        return hidden

    def calls(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None, seen: int
    ) -> list[Call]:
        """Find what the decoder would call each layer with for new rows (B, q, H) after ``seen`` tokens."""
        return self._shadow.calls(hidden, positions, attention_mask, seen)

    def lean_form(self, layers: Sequence[nn.Module]) -> list[LeanLayer] | None:
        """Describe layers in the place of the model's last ones for `run_lean`; ``None`` where its own are not lean."""
        return None if self._lean is None else self._lean.form(layers)

    def run_lean(
        self,
        layers: Sequence[LeanLayer],
        hidden: torch.Tensor,
        first: int,
        *,
        cache: GrowingCache | None,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        picked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run lean layers, the first of which stands for layer ``first``, as `run` does the model's own.

        Without a cache over whole sequences.  Where ``picked`` rows (n,) of the B * q alone are wanted: (n, H).
        """
        assert self._lean is not None
        return self._lean.run(layers, hidden, first, cache, positions, attention_mask, picked)

    def step_lean(
        self,
        steps: Steps,
        hidden: torch.Tensor,
        first: int,
        *,
        cache: GrowingCache,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None,
        picked: Sequence[int] | None,
    ) -> torch.Tensor | None:
        """Do what `run_lean` does in one call, over the few rows of a step; ``None`` for other rows."""
        assert self._lean is not None
        last = len(cache.growing)
        return self._lean.step(steps, hidden, 0, first, last, cache, positions, attention_mask, picked)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Full-model logits (..., V) of the last layer's output (..., H)."""
        hidden = self.norm(hidden) if self._lean is None else lean.normed(self.norm, hidden)
        # A plain matrix by the fastest product; what a quantised or sharded one is, only its module knows.
        plain = self._lean is not None and lean.is_plain(self.output)
        logits = linear(hidden, self.output.weight, self.output.bias) if plain else self.output(hidden)
        return self.cap(logits if self.logit_factor == 1 else logits * self.logit_factor)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Cap logits softly where the model does: ``cap * tanh(logits / cap)``."""
        return logits if self.logit_cap is None else self.logit_cap * (logits / self.logit_cap).tanh()

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return exit positions as a tuple, or say what is wrong with them.

        Raises
        ------
        InputError
            If they are not whole numbers, rising strictly, within 1 and L - 1.
        """
        checked = tuple(layers)
        if not checked or not all(
            isinstance(layer, int) and not isinstance(layer, bool) for layer in checked
        ):
            raise InputError(
                f"layers is {layers!r}: give the layers to exit after as whole numbers, such as (6, 12)"
            )
        for layer in checked:
            if not 1 <= layer < self.num_layers:
                raise InputError(
                    f"layers contains {layer}: this model has {self.num_layers} layers, "
                    f"so an exit can follow layers 1 to {self.num_layers - 1}"
                )
        if any(low >= high for low, high in pairwise(checked)):
            raise InputError(f"layers is {checked}: list the exits from shallow to deep, each once")
        return checked

    @property
    def is_intact(self) -> bool:
        """Whether the model's layers are those that were taken apart."""
        stack = self._decoder.get_submodule(self._layers_name).children()
        same = all(map(is_, stack, self.layers))
        return same and (self._lean is None or self._lean.fits(self.layers))

    @property
    def is_lean(self) -> bool:
        """Whether decoding takes the short path of `lean` instead of the model's own modules."""
        return self._lean is not None

    @property
    def deviation(self) -> float:
        """How far what runs here was from the model's own forward when it was proved.

        The largest difference of a hidden state, key, value or logit, as a share of the largest residual (for keys,
        values and logits: of the largest of them), in float32.  0 means the same bits.
        """
        return self._deviation

    def prove(self, layers: Sequence[int]) -> None:
        """Check on the model in hand that segments cut at ``layers`` compute what its own forward does.

        Prefill, one cached token, and several deferred tokens, on a left-padded batch and on one row: hidden states
        after every layer, keys, values and logits are compared.  Where the lean path deviates it is given up for the
        model's own modules.  `deviation` tells how far apart they were.

        Raises
        ------
        ModelError
            Naming the first layer that deviates.
        """
        if self._lean is not None:
            try:
                self._prove(layers)
            except (ModelError, *_UNFIT):
                self._lean = None
            else:
                return
        try:
            self._prove(layers)
        except _UNFIT as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"model: {type(self.model).__name__} cannot be run in segments ({reason}); exits need a decoder of "
                "attention layers"
            ) from error

    @torch.no_grad()
    def _prove(self, layers: Sequence[int]) -> None:
        self._deviation = 0.0
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab_size, (2, 10), generator=generator).to(self.device)
        mask = torch.ones_like(tokens)
        mask[0, :2] = 0
        self._learn(tokens, positions_from_mask(mask))
        self._prove_on(tokens, mask, (0, *layers, self.num_layers))
        # A row by itself goes other ways: no mask, and products of a single row.
        self._prove_on(tokens[1:], None, (0, *layers, self.num_layers))

    def _prove_on(self, tokens: torch.Tensor, padding: torch.Tensor | None, bounds: tuple[int, ...]) -> None:
        mask = torch.ones_like(tokens) if padding is None else padding
        positions = positions_from_mask(mask)
        own = DynamicCache(config=self.config)
        ours = self.new_cache()
        embedded = self.embed(tokens, positions)
        filled = 0
        for end in (6, 7, 10):
            with _recorded_outputs(self.layers) as recorded:
                expected = self.model(
                    input_ids=tokens[:, filled:end],
                    attention_mask=None if padding is None else padding[:, :end],
                    position_ids=positions[:, filled:end],
                    use_cache=True,
                    **cache_argument(self.model.forward, own),
                )
            hidden = embedded[:, filled:end]
            largest = 0.0
            for first, last in pairwise(bounds):
                # Every layer by itself, so that a deviation is named by its layer.
                for layer in range(first, last):
                    hidden = self.run(
                        hidden,
                        layer,
                        layer + 1,
                        cache=ours,
                        positions=positions[:, filled:end],
                        attention_mask=padding,
                    )
                    reference = _first(recorded[layer])
                    # A residual keeps what was rounded where it was largest, also when a later layer cancels it.
                    largest = max(largest, float(reference.abs().max()))
                    self._compare(hidden, reference, mask[:, filled:end], f"layer {layer + 1}", largest)
            self._compare(self.logits(hidden), expected.logits, mask[:, filled:end], "the output layer")
            filled = end
        self._prove_deferred(tokens, padding, positions, own, bounds)

    def _learn(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Find out what a shadow cannot see: what the layers return, and whether tokens alone make the embedding."""
        with _recorded_outputs(self.layers) as recorded:
            self.model(input_ids=tokens[:, :1], use_cache=False)
        self._shadow.returns_tuples(recorded)
        plain = self.model.get_input_embeddings()(tokens)
        self._plain_embedding = torch.equal(plain, self._shadow.embed(tokens, positions))

    def _prove_deferred(
        self,
        tokens: torch.Tensor,
        padding: torch.Tensor | None,
        positions: torch.Tensor,
        own: DynamicCache,
        bounds: tuple[int, ...],
    ) -> None:
        """Compare the keys and values of segments that each take the tokens in another number of pieces."""
        mask = torch.ones_like(tokens) if padding is None else padding
        cache = self.new_cache()
        hidden = self.embed(tokens, positions)
        for segment, (first, last) in enumerate(pairwise(bounds)):
            step = (3, 4, tokens.shape[1])[segment % 3]
            pieces = []
            for start in range(0, tokens.shape[1], step):
                rows = slice(start, start + step)
                pieces.append(
                    self.run(
                        hidden[:, rows],
                        first,
                        last,
                        cache=cache,
                        positions=positions[:, rows],
                        attention_mask=padding,
                    )
                )
            hidden = torch.cat(pieces, dim=1)
        for layer in range(self.num_layers):
            for name in ("keys", "values"):
                mine, reference = (
                    # (batch, heads, tokens, head size) to (batch, tokens, all heads)
                    getattr(held.layers[layer], name).transpose(1, 2).flatten(2)
                    for held in (cache, own)
                )
                # A sliding window forgets its oldest tokens; ours keeps them behind the mask.
                kept = reference.shape[1]
                self._compare(mine[:, -kept:], reference, mask[:, -kept:], f"layer {layer + 1}")

    def _compare(
        self,
        mine: torch.Tensor,
        reference: torch.Tensor,
        mask: torch.Tensor,
        where: str,
        largest: float | None = None,
    ) -> None:
        kept = mask.bool()
        mine, reference = mine[kept].float(), reference[kept].float()
        scale = largest or float(reference.abs().max())
        allowed = _TOLERANCE.get(self.dtype, 1e-5) * scale
        difference = float((mine - reference).abs().max())
        if difference and scale:
            self._deviation = max(self._deviation, difference / scale)
        if not difference <= allowed:
            raise ModelError(
                f"model: {type(self.model).__name__} cannot be run in segments: {where} differs from the model's own "
                f"forward by {difference:.3g} (allowed {allowed:.3g}), so exits on it would not be exact"
                + self._why()
            )

    def _why(self) -> str:
        """Say what a user is likely to have overlooked."""
        if not self.model.training:
            return ""
        return "; it is in training mode, where dropout makes every pass another: call model.eval() first"


@contextmanager
def _recorded_outputs(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect what each layer returns; nothing of it stays on the model.

    (``output_hidden_states`` would do, but leaves transformers' hooks on the model for good.)
    """
    recorded: list[Any] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        recorded.append(output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def is_composite(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of tensors, as torchao keeps a quantised weight; it can do little but multiply."""
    return hasattr(tensor, "__tensor_flatten__")


def plain_values(parameter: torch.Tensor) -> torch.Tensor:
    """Values of a parameter that can be sliced and computed with, apart from any gradient."""
    values: Any = parameter.detach()
    found: torch.Tensor = values.dequantize() if is_composite(values) else values
    return found


def not_numbers(what: str) -> ModelError:
    """Say that ``what`` (a head, the last layer) gave NaN for logits, and what may be the cause."""
    return ModelError(
        f"model: {what} gave logits that are not numbers; its weights are damaged or its dtype overflows (float16 "
        "does, where bfloat16 and float32 do not)"
    )


def positions_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Rotary positions (B, T) of an attention mask (B, T): tokens count from 0 after the left padding."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class _Parts(NamedTuple):
    decoder: Any
    layers_name: str
    layers: nn.ModuleList
    norm: nn.Module


def _take_apart(model: Any) -> _Parts:
    """Find the parts of a model, or say which one is missing."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model is a {name}: give a Hugging Face causal language model")
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"model: {name} is an encoder-decoder; exits need a decoder-only causal language model"
        )
    if model.get_output_embeddings() is None:
        raise ModelError(f"model: {name} has no output layer; load it with AutoModelForCausalLM")
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    other = [kind for kind in kinds if kind not in _KINDS_OF_ATTENTION]
    if getattr(model, "_is_stateful", False) or other:
        what = f"layers of type {other[0]}" if other else "a recurrent state"
        raise ModelError(f"model: {name} has {what}; offramp runs layers of full or sliding attention only")
    decoder: Any = model.get_decoder()
    stacks = [
        (key, child)
        for key, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    if len(stacks) != 1:
        raise ModelError(
            f"model: {name} has no single stack of decoder layers, which exits would be put between"
        )
    norms = [norm for norm in (getattr(decoder, key, None) for key in _FINAL_NORMS) if norm is not None]
    if len(norms) != 1:
        raise ModelError(
            f"model: {name} has no norm between its last layer and its output matrix that offramp knows "
            f"({', '.join(_FINAL_NORMS)})"
        )
    return _Parts(decoder, *stacks[0], norms[0])


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Read what a family does to its logits: the factor they are multiplied with, and the soft cap."""
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    cap = getattr(config, "final_logit_softcapping", None)
    return factor, None if cap is None else float(cap)


def _first(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
