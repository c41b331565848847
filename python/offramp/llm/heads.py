"""Exit heads: small modules that turn a hidden state after a chosen layer into logits.

A head is a transform, a norm and output rows, the rows over the whole vocabulary or over a shortlist of tokens.
For `training`, `scoring`, `decoding` and `storage`; knows the model only through `Trunk`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from offramp.errors import InputError
from offramp.llm.trunk import Trunk

_KINDS = ("linear", "mlp")
_INITS = ("copy", "scratch")


@dataclass(frozen=True)
class HeadConfig:
    """What kind of head to put after every exit layer.

    Attributes
    ----------
    kind : {"mlp", "linear"}
        ``"linear"`` is the paper's: a norm and an output matrix of its own, both trained.  ``"mlp"`` trains a small
        transform of the hidden state (a linear map fitted by ridge regression to the last layer's output, plus a
        gated residual block) and reads it with the model's own norm and output rows.
    shortlist : int, optional
        Number of tokens the head can emit: those the model ranks among its first eight most often.  ``None``: the
        whole vocabulary.  A shortlist makes a head cheap, and a token outside it is never emitted by the head.
    init : {"copy", "scratch"}
        For ``"linear"``: start from the model's norm and output rows, or from noise.
    width : int, optional
        For ``"mlp"``: width of the residual block; default the model's hidden size.
    """

    kind: Literal["mlp", "linear"] = "mlp"
    shortlist: int | None = 8192
    init: Literal["copy", "scratch"] = "copy"
    width: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no head can be built from."""
        if self.kind not in _KINDS:
            raise InputError(f"head kind is {self.kind!r}: choose one of {', '.join(_KINDS)}")
        if self.init not in _INITS:
            raise InputError(f"init is {self.init!r}: choose one of {', '.join(_INITS)}")
        for name, value, least in (("shortlist", self.shortlist, 2), ("width", self.width, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name} is {value!r}: give a whole number of at least {least}, or None")

    @classmethod
    def of(cls, head: str | HeadConfig) -> HeadConfig:
        """Read a head given by the name of its kind: ``"linear"`` is the paper's, over the whole vocabulary."""
        if isinstance(head, HeadConfig):
            return head
        return cls(kind=head, shortlist=None if head == "linear" else 8192)  # type: ignore[arg-type]  # checked above

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class ExitHead(nn.Module):
    """A transform, a norm, and output rows.

    Parameters
    ----------
    trunk
        The model the head reads; only shapes, the norm and the output rows are taken from it.
    config
        The kind of head.
    shortlist : (S,) int64, optional
        Token of each output row; ``None`` where the rows are the whole vocabulary.
    rows : (weight (S, H), bias (S,) or None), optional
        The model's output rows from `output_rows`, so that heads with one shortlist share their memory.
    """

    transform: nn.Module
    norm: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    shortlist: torch.Tensor | None

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
        self.norm = copy.deepcopy(trunk.norm).float()
        if config.kind == "linear":
            self.transform = nn.Identity()
            if config.init == "scratch":
                weight = torch.randn_like(weight) * weight.std()
                bias = None if bias is None else torch.zeros_like(bias)
                for parameter in self.norm.parameters():
                    nn.init.ones_(parameter)
            self.weight = nn.Parameter(weight.clone())
            self.bias = None if bias is None else nn.Parameter(bias.clone())
        else:
            self.transform = RidgeMLP(trunk.hidden_size, config.width or trunk.hidden_size).to(trunk.device)
            self.register_buffer("weight", weight, persistent=False)
            self.register_buffer("bias", bias, persistent=False)
        self.requires_grad_(True)
        if config.kind == "mlp":
            self.norm.requires_grad_(False)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., H): what the output rows are multiplied with."""
        features: torch.Tensor = self.norm(self.transform(hidden))
        return features

    if TYPE_CHECKING:

        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            """As `forward`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., S) of hidden states (..., H)."""
        return functional.linear(self.features(hidden), self.weight, self.bias)

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

    def cost(self) -> dict[str, int]:
        """Parameters read, bytes read, and multiply-adds of one token."""
        read = [*self.transform.parameters(), *self.norm.parameters(), self.weight]
        read += [] if self.bias is None else [self.bias]
        multiply_adds = sum(p.numel() for p in read if p.ndim == 2)
        return {
            "parameters": sum(p.numel() for p in read),
            "bytes": sum(p.numel() * p.element_size() for p in read),
            "multiply_adds": multiply_adds,
        }


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


class RidgeMLP(nn.Module):
    """``A h + c + W2 silu(W1 n(h))``: a fitted linear map and a residual block that starts at zero.

    ``n`` scales its input to unit root mean square.  `fit` sets A and c by ridge regression.
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
        mapped: torch.Tensor = self.linear(hidden) + self.down(functional.silu(self.up(unit)))
        return mapped

    @torch.no_grad()
    def fit(self, inputs: torch.Tensor, targets: torch.Tensor, *, strength: float = 1e-3) -> None:
        """Set the linear map to the ridge regression of ``targets`` (n, H) on ``inputs`` (n, H), in float64.

        ``strength`` is the ridge penalty relative to the mean squared input.
        """
        x, y = inputs.double(), targets.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        gram = x.T @ x
        gram.diagonal().add_(strength * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, x.T @ y)
        self.linear.weight.copy_(solution.T)
        self.linear.bias.copy_(y_mean - x_mean @ solution)


def output_rows(trunk: Trunk, shortlist: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output matrix (S, H) and bias (S,) of the model in float32, restricted to a shortlist of tokens.

    A factor the model puts on its logits is in them; a soft cap is not.
    """
    weight = trunk.output.weight.detach()
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
