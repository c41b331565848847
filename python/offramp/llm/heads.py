"""Exit heads: small modules that turn hidden states after a chosen layer into logits.

A head gives features, which output rows turn into logits, the rows over the whole vocabulary or over a shortlist of
tokens.  Heads may have attention of their own, with keys and values of their own (`AdapterHead`).
For `training`, `scoring`, `decoding` and `storage`; knows the model only through `Trunk` and `branch`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional

from offramp.errors import InputError
from offramp.llm.branch import Branch, BranchState
from offramp.llm.few import Linear, Narrow
from offramp.llm.lean import normed, plain_norm
from offramp.llm.products import linear
from offramp.llm.rounding import round_linear, rounded
from offramp.llm.states import Picked
from offramp.llm.trunk import Trunk, plain_values

_INITS = ("copy", "scratch")
# On SmolLM2, after layer 14 of 30, adapters agree with the model more and more at 2.5 and 6 times the usual 1e-3 (45,
# 51 and 52% with 300 000 tokens, two epochs); after layer 26 five times what this gives costs two points.  `mlp` heads
# (100 000 tokens, two epochs) gain two to three points by 3 and 6 times up to layer 22, and lose one after layer 26.
_RATE = 9e-3
_HEADS: dict[str, type[ExitHead]] = {}


@dataclass(frozen=True)
class HeadConfig:
    """What kind of head to put after exit layers: the same after all, or one for each (`EarlyExitModel`).

    Attributes
    ----------
    kind : {"mlp", "linear", "adapter"} or a name given to `register_head`
        ``"linear"`` is the paper's: a norm and an output matrix of its own, both trained.  ``"mlp"`` trains a small
        transform of the hidden state (a linear map fitted by ridge regression to the last layer's output, plus a
        gated residual block) and reads it with the model's own norm and output rows.  ``"adapter"`` trains a linear
        map, fitted to the input of the model's last layer, and decoder layers that start as the model's last, with
        keys and values of their own; norm and output rows are the model's.
    shortlist : int, optional
        Number of tokens the head can emit: those the model ranks among its first eight most often.  ``None``: the
        whole vocabulary.  A shortlist makes a head cheap, and a token outside it is never emitted by the head.
    init : {"copy", "scratch"}
        For ``"linear"``: start from the model's norm and output rows, or from noise.
    width : int, optional
        For ``"mlp"``: width of the residual block; default the model's hidden size.
    depth : int
        For ``"adapter"``: number of decoder layers.
    options : dict
        For registered kinds: whatever they read, as plain values.
    bits : {8, None}
        What weights are rounded to where the head is used: output rows, and linear maps of ``"mlp"`` and
        ``"adapter"``, to whole numbers of eight bits times a scale for each output.  Decoding reads all weights of a
        head for each token it is asked about, and that is what it costs; thresholds are calibrated with the rounded
        ones, and rounded everywhere, so that they hold on other machines, too, also where nothing is gained by it.
        Training, and what is stored, is not rounded.  ``None``: not at all.
    """

    kind: str = "mlp"
    shortlist: int | None = 8192
    init: Literal["copy", "scratch"] = "copy"
    width: int | None = None
    depth: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: Literal[8] | None = 8

    def __post_init__(self) -> None:
        """Refuse what no head can be built from."""
        if self.kind not in _HEADS:
            raise InputError(
                f"head kind is {self.kind!r}: choose one of {', '.join(_HEADS)}, or register your own with "
                "offramp.register_head first"
            )
        if self.init not in _INITS:
            raise InputError(f"init is {self.init!r}: choose one of {', '.join(_INITS)}")
        for name, value, least in (("shortlist", self.shortlist, 2), ("width", self.width, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name} is {value!r}: give a whole number of at least {least}, or None")
        if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 1:
            raise InputError(f"depth is {self.depth!r}: give a whole number of at least 1")
        if self.bits not in (8, None):
            raise InputError(f"bits is {self.bits!r}: give 8, or None for weights as they were trained")

    @classmethod
    def of(cls, head: str | HeadConfig) -> HeadConfig:
        """Read a head given by the name of its kind: ``"linear"`` is the paper's, over the whole vocabulary."""
        if isinstance(head, HeadConfig):
            return head
        return cls(kind=head, shortlist=None, bits=None) if head == "linear" else cls(kind=head)

    @classmethod
    def for_layers(
        cls, head: str | HeadConfig | Mapping[int, str | HeadConfig], layers: Sequence[int]
    ) -> dict[int, HeadConfig]:
        """Read what heads to put after the layers: the same after all, or one given for each."""
        if not isinstance(head, Mapping):
            return dict.fromkeys(layers, cls.of(head))
        if set(head) != set(layers):
            raise InputError(
                f"head is given for layers {', '.join(sorted(map(str, head)))}: give one for each exit, "
                f"{', '.join(map(str, layers))}"
            )
        return {layer: cls.of(head[layer]) for layer in layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class HeadState(Protocol):
    """What a head with attention of its own keeps of the rows it has read, for one generation."""

    @property
    def length(self) -> int:
        """Rows read."""

    def crop(self, length: int) -> None:
        """Forget the rows from ``length`` on."""


class ExitHead(nn.Module):
    """Hidden states in, logits out: the base of every kind of head.

    A kind without memory defines `features`.  One that attends to earlier tokens defines `read`, `new_state` and
    `advance` instead.  Logits are always `features` times output rows: by default the model's own, which are neither
    trained nor stored; a kind may train rows of its own with `set_rows`.  Parameters that require gradients after
    construction are trained.

    Parameters
    ----------
    trunk
        The model the head reads.  A head may copy what it needs, and must not keep the trunk.
    config
        The kind of head.
    shortlist : (S,) int64, optional
        Token of each output row; ``None`` where the rows are the whole vocabulary.
    rows : (weight (S, H), bias (S,) or None), optional
        The model's output rows from `output_rows`, so that heads with one shortlist share their memory.

    Attributes
    ----------
    fits : int or None
        The layer whose output the head's first map is to predict before training starts, by `fit`; ``None`` where
        there is nothing to fit.
    borrowed : tuple of str
        Beginnings of the names of parameters that are the model's own, and are not stored.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    shortlist: torch.Tensor | None
    fits: int | None = None
    borrowed: tuple[str, ...] = ()
    _narrow: Narrow | None = None

    def __init__(
        self,
        trunk: Trunk,
        config: HeadConfig,
        shortlist: torch.Tensor | None,
        rows: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        weight, bias = rows or output_rows(trunk, shortlist)
        self.register_buffer("shortlist", shortlist.to(trunk.device) if shortlist is not None else None)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., H), what the output rows are multiplied with, for hidden states (..., H) each by itself."""
        raise NotImplementedError(f"{type(self).__name__} defines no features")

    def read(self, hidden: torch.Tensor, picked: Picked) -> torch.Tensor:
        """Features (n, H) at the picked rows of whole sequences (B, T, H), padded on the right.

        For training and scoring.
        """
        return self.features(hidden[picked])

    def new_state(self) -> HeadState | None:
        """Begin a generation; ``None`` for a kind without memory."""
        return None

    def advance(
        self,
        hidden: torch.Tensor,
        state: HeadState | None,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Features (B, H) of the newest row, after reading all rows (B, q, H) that are new since the last call.

        For decoding.  ``positions`` (B, q) are the rows' own, ``mask`` (B, at least read + q) is 0 at left padding.
        """
        return self.features(hidden[:, -1])

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (..., S) of features (..., H)."""
        return linear(features, self.weight, self.bias, self._narrow)

    if TYPE_CHECKING:

        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            """As `forward`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., S) of hidden states (..., H), for a kind without memory."""
        return self.logits(self.features(hidden))

    def fit(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Set the first map to predict ``targets`` (n, H), the states after layer `fits`, from ``inputs`` (n, H)."""

    def linears(self) -> list[nn.Linear]:
        """Linear maps that are rounded where the head is used; beside them its output rows are (`HeadConfig.bits`).

        Multiply with them by `offramp.llm.products.linear` and ``*Linear.of(map)``.
        """
        return []

    def peak_rate(self, skipped: float) -> float:
        """Peak learning rate that suits the head, after which a share ``skipped`` of the model's layers comes."""
        return 1e-3

    def set_rows(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Train and store output rows of the head's own, starting from these."""
        for name, rows in (("weight", weight), ("bias", bias)):
            del self._buffers[name]
            self.register_parameter(name, None if rows is None else nn.Parameter(rows.clone()))

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Token ids of output rows (any shape, int64)."""
        return rows if self.shortlist is None else self.shortlist[rows]

    def scatter(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Logits (B, S) as float32 logits (B, V), -inf at tokens the head cannot emit."""
        if self.shortlist is None:
            return logits.float()
        full = logits.new_full((logits.shape[0], vocab_size), -torch.inf, dtype=torch.float32)
        full[:, self.shortlist] = logits.float()
        return full

    def own_state(self) -> dict[str, torch.Tensor]:
        """Give what is stored of the head: its parameters and buffers without those that are the model's."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name != "shortlist" and not name.startswith(self.borrowed or ("\0",))
        }

    def cost(self) -> dict[str, int]:
        """Parameters read, bytes read, and multiply-adds of one token, keys and values left out."""
        read = [*self.parameters(), *(b for name, b in self.named_buffers() if name != "shortlist")]
        maps = [Linear(self.weight, None, self._narrow), *map(Linear.of, self.linears())]
        instead = [(item.weight, item.narrow) for item in maps if item.narrow is not None]
        size = sum(tensor.nbytes for tensor in read)
        return {
            "parameters": sum(tensor.numel() for tensor in read),
            "bytes": size - sum(wide.nbytes - sum(part.nbytes for part in few) for wide, few in instead),
            "multiply_adds": sum(tensor.numel() for tensor in read if tensor.ndim == 2),
        }


H = TypeVar("H", bound=type[ExitHead])


def register_head(kind: str) -> Callable[[H], H]:
    """Make a subclass of `ExitHead` a kind of head, to be named in `HeadConfig`.

    Heads of the kind can be loaded only where it is registered.

    Examples
    --------
    >>> from torch import nn
    >>> @register_head("doctest-scaled")
    ... class Scaled(ExitHead):
    ...     def __init__(self, trunk, config, shortlist, rows=None):
    ...         super().__init__(trunk, config, shortlist, rows)
    ...         self.scale = nn.Parameter(torch.ones(trunk.hidden_size, device=trunk.device))
    ...
    ...     def features(self, hidden):
    ...         return self.scale * hidden
    >>> HeadConfig("doctest-scaled").kind
    'doctest-scaled'
    """

    def register(head: H) -> H:
        if not (isinstance(head, type) and issubclass(head, ExitHead)):
            raise InputError(f"head is {head!r}: register a subclass of ExitHead")
        other = _HEADS.get(kind, head)
        if (other.__module__, other.__qualname__) != (head.__module__, head.__qualname__):
            raise InputError(f"kind is {kind!r}: there is another head of this name; choose another name")
        _HEADS[kind] = head
        return head

    return register


def make_head(
    trunk: Trunk,
    config: HeadConfig,
    shortlist: torch.Tensor | None,
    rows: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> ExitHead:
    """Make an untrained head of the kind a config names."""
    return _HEADS[config.kind](trunk, config, shortlist, rows)


def make_heads(
    trunk: Trunk, configs: Mapping[int, HeadConfig], shortlists: Mapping[int, torch.Tensor | None]
) -> ExitHeads:
    """Make untrained heads, by the layer they follow; those of one shortlist share its output rows."""
    lists = {id(tokens): tokens for tokens in shortlists.values()}
    rows = {key: output_rows(trunk, tokens) for key, tokens in lists.items()}
    return ExitHeads(
        {
            layer: make_head(trunk, config, shortlists[layer], rows[id(shortlists[layer])])
            for layer, config in configs.items()
        }
    )


@register_head("linear")
class LinearHead(ExitHead):
    """The paper's: a norm and an output matrix, both trained."""

    def __init__(
        self,
        trunk: Trunk,
        config: HeadConfig,
        shortlist: torch.Tensor | None,
        rows: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__(trunk, config, shortlist, rows)
        self.norm = copy.deepcopy(trunk.norm).float().requires_grad_(True)
        weight, bias = self.weight, self.bias
        if config.init == "scratch":
            weight = torch.randn_like(weight) * weight.std()
            bias = None if bias is None else torch.zeros_like(bias)
            _only_normalise(self.norm, trunk)
        self.set_rows(weight, bias)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the norm of (..., H)."""
        features: torch.Tensor = self.norm(hidden)
        return features


class _ReadAsTheModel(ExitHead):
    """A head whose features are put through the model's own norm, which is neither trained nor stored."""

    borrowed = ("norm.",)
    # Where that was proved of the trunk, its norm is one that can be taken apart, too.
    _is_lean = False

    def __init__(
        self,
        trunk: Trunk,
        config: HeadConfig,
        shortlist: torch.Tensor | None,
        rows: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__(trunk, config, shortlist, rows)
        self.norm = copy.deepcopy(trunk.norm).float().requires_grad_(False)
        self._is_lean = trunk.is_lean

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model's output rows read: its norm of (..., H)."""
        found: torch.Tensor = normed(self.norm, hidden) if self._is_lean else self.norm(hidden)
        return found

    def peak_rate(self, skipped: float) -> float:
        """Peak learning rate: the deeper, the closer the fitted map is to its goal, and the more a high one ruins."""
        return _RATE * skipped


@register_head("mlp")
class MLPHead(_ReadAsTheModel):
    """A small trained transform, read with the model's own norm and output rows."""

    def __init__(
        self,
        trunk: Trunk,
        config: HeadConfig,
        shortlist: torch.Tensor | None,
        rows: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__(trunk, config, shortlist, rows)
        self.fits = trunk.num_layers
        self.transform = RidgeMLP(trunk.hidden_size, config.width or trunk.hidden_size).to(trunk.device)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the norm of the transform of (..., H)."""
        return self.finish(self.transform(hidden))

    def linears(self) -> list[nn.Linear]:
        """Give those of the transform."""
        return [self.transform.linear, self.transform.up, self.transform.down]

    def fit(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Fit the linear map by ridge regression."""
        fit_linear(self.transform.linear, inputs, targets)


@register_head("adapter")
class AdapterHead(_ReadAsTheModel):
    """Decoder layers of the model's own class, between a linear map and the model's own norm and output rows.

    The map is fitted to the input of the model's last layers, copies of which the layers start as: a head that maps
    perfectly is the model.  EAGLE and Kangaroo are relatives.
    """

    def __init__(
        self,
        trunk: Trunk,
        config: HeadConfig,
        shortlist: torch.Tensor | None,
        rows: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__(trunk, config, shortlist, rows)
        self.branch = Branch(trunk, config.depth)
        self.fits = trunk.num_layers - config.depth
        self.linear = nn.Linear(trunk.hidden_size, trunk.hidden_size).to(trunk.device)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.layers = self.branch.new_layers()

    def read(self, hidden: torch.Tensor, picked: Picked) -> torch.Tensor:
        """Run over whole sequences; features at the picked rows."""
        # In the dtype of the hidden states, also where products are narrower.
        mapped = self.linear(hidden).to(hidden.dtype)
        return self.finish(self.branch.read(self.layers, mapped, picked))

    def new_state(self) -> BranchState:
        """Give an empty cache."""
        # Only what the class itself does after its layers is known.
        known = self._is_lean and type(self).finish is _ReadAsTheModel.finish
        after = plain_norm(self.norm) if known else None
        return self.branch.new_state(self.layers, Linear.of(self.linear), after)

    def advance(
        self,
        hidden: torch.Tensor,
        state: HeadState | None,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run over the new rows, adding their keys and values to the state."""
        own = cast(BranchState, state)
        if (found := self.branch.step(hidden, positions, mask, own)) is not None:
            return found
        mapped = linear(hidden, *Linear.of(self.linear))
        return self.finish(self.branch.advance(self.layers, mapped, positions, mask, own))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, S) at every token of whole sequences (B, T, H)."""
        every = tuple(
            index.flatten() for index in torch.meshgrid(*map(torch.arange, hidden.shape[:2]), indexing="ij")
        )
        flat: torch.Tensor = self.logits(self.read(hidden, cast(Picked, every)))
        return flat.view(*hidden.shape[:2], -1)

    def linears(self) -> list[nn.Linear]:
        """Give the first one, and those of the layers unless modules of the model's own class read them."""
        within = self.layers.modules() if self._is_lean else ()
        return [self.linear, *(module for module in within if isinstance(module, nn.Linear))]

    def fit(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Fit the linear map by ridge regression."""
        fit_linear(self.linear, inputs, targets)


class ExitHeads(nn.ModuleDict):
    """The heads of one model, by the layer they follow, shallow to deep."""

    def __init__(self, heads: Mapping[int, ExitHead]) -> None:
        super().__init__({str(layer): head for layer, head in heads.items()})

    @property
    def layers(self) -> tuple[int, ...]:
        """The exits."""
        return tuple(int(name) for name in self)

    def after(self, layer: int) -> ExitHead:
        """Return the head after a layer."""
        return cast(ExitHead, self[str(layer)])

    def own_state(self) -> dict[str, torch.Tensor]:
        """Give what is stored of all heads, named ``<layer>.<parameter>``."""
        return {
            f"{layer}.{name}": tensor
            for layer in self.layers
            for name, tensor in self.after(layer).own_state().items()
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def serving(self, dtype: torch.dtype) -> ExitHeads:
        """Give heads to use on hidden states of a dtype: a copy, its weights rounded as their configs say."""
        served = copy.deepcopy(self)
        known: dict[int, tuple[torch.Tensor, Narrow | None]] = {}
        for head in map(served.after, served.layers):
            if head.config.bits is None:
                continue
            for item in head.linears():
                round_linear(item)
            # Heads of one shortlist share their rows, also with some that are not rounded.
            rows = head.weight
            if id(rows) not in known:
                known[id(rows)] = rounded(rows)
            wide, head._narrow = known[id(rows)]
            head.weight = nn.Parameter(wide, requires_grad=False) if isinstance(rows, nn.Parameter) else wide
        return served.to(dtype)


class RidgeMLP(nn.Module):
    """``A h + c + W2 silu(W1 n(h))``: a linear map and a residual block that starts at zero.

    ``n`` scales its input to unit root mean square.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., H) to (..., H)."""
        unit = functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
        block = linear(functional.silu(linear(unit, *Linear.of(self.up))), *Linear.of(self.down))
        return linear(hidden, *Linear.of(self.linear)) + block


@torch.no_grad()
def _only_normalise(norm: nn.Module, trunk: Trunk) -> None:
    """Set a norm's parameters so that it leaves what has zero mean and unit mean square as it is."""
    weights = []
    for name, parameter in norm.named_parameters():
        if name.split(".")[-1] == "bias":
            parameter.zero_()
        else:
            weights.append(parameter)
    unit = torch.linspace(-1, 1, trunk.hidden_size, device=trunk.device)
    unit /= unit.square().mean().sqrt()

    def change(value: float) -> float:
        for weight in weights:
            weight.fill_(value)
        return float((norm(unit[None]) - unit).square().mean())

    # Some families multiply by one more than the weight.
    change(min((0.0, 1.0), key=change))


@torch.no_grad()
def fit_linear(
    linear: nn.Linear, inputs: torch.Tensor, targets: torch.Tensor, *, strength: float = 1e-3
) -> None:
    """Set a linear map to the ridge regression of ``targets`` (n, H) on ``inputs`` (n, H), in float64.

    ``strength`` is the ridge penalty relative to the mean squared input.

    Raises
    ------
    InputError
        If all inputs are the same, as of a single token.
    """
    x, y = inputs.double(), targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    if not gram.any():
        raise InputError(
            f"tokens: there is too little text to fit a head to, {len(inputs)} states that are all the same; give more"
        )
    gram.diagonal().add_(strength * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, x.T @ y)
    linear.weight.copy_(solution.T)
    linear.bias.copy_(y_mean - x_mean @ solution)


def output_rows(trunk: Trunk, shortlist: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output matrix (S, H) and bias (S,) of the model in float32, restricted to a shortlist of tokens.

    A factor the model puts on its logits is in them; a soft cap is not.
    """
    weight = plain_values(trunk.output.weight)
    bias = getattr(trunk.output, "bias", None)
    bias = None if bias is None else bias.detach()
    if shortlist is not None:
        rows = shortlist.to(weight.device)
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    weight = weight.float() * trunk.logit_factor
    return weight, None if bias is None else bias.float() * trunk.logit_factor


def choose_shortlist(counts: torch.Tensor, size: int | None) -> torch.Tensor | None:
    """Token ids, ascending, of the ``size`` largest counts (V,); ``None`` where that is the whole vocabulary.

    Equal counts are taken in the order of the token ids.
    """
    if size is None or size >= len(counts):
        return None
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values
