"""Build small plain modules, one for every way in which a module's tensors can be unusual.

None of them knows transformers or lading. Each class builds without arguments, runs on `example_input()`, and says in
its docstring what a loader, a planner or an offloader may get wrong with it. `build(Net, seed)` returns the same
numbers in every process, and no stored tensor equals what the class would initialise: what was never loaded cannot pass
for loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

WIDTH = 8


def build(net_class: type[nn.Module], seed: int = 0) -> nn.Module:
    """Return the net in evaluation mode, every stored tensor drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = net_class()
    with torch.no_grad():
        for name, tensor in net.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(_drawn(name, tensor, generator))
    return net.eval()


def example_input(seed: int = 0) -> torch.Tensor:
    """Return the input that every net here takes: float32 [3, WIDTH]."""
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def _drawn(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        noise = torch.randn(tensor.shape, generator=generator) * 0.5
        return (noise.abs() + 0.5 if name.endswith("running_var") else noise).to(tensor.dtype)
    if tensor.dtype == torch.bool:
        return torch.randint(0, 2, tensor.shape, generator=generator).bool()
    return torch.randint(1, 100, tensor.shape, generator=generator).to(tensor.dtype)


class Plain(nn.Module):
    """Two linear layers and a norm: nothing unusual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)).relu())


class BareParameters(nn.Module):
    """Parameters that stand directly on modules with children, at two depths: neither is in a leaf module."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(WIDTH).uniform_())
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * self.scale)

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, WIDTH))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.inner = self.Inner()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x + self.token)) * self.temperature


class SharedModules(nn.Module):
    """One module under two names: its tensors stand twice in `state_dict` and once in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.between = nn.LayerNorm(WIDTH)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


class TiedParameters(nn.Module):
    """One parameter in two modules of different kinds, and a second one held by the root and by a child."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(WIDTH)
        self.gain = self.norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = self.embedding(x.abs().mul(3).long().clamp(max=15)).sum(1)
        return self.head(self.norm(looked_up + x) * self.gain)


class ZerosAndOnes(nn.Module):
    """Parameters made of zeros, ones, full and eye: a build that diverts only `empty` and `rand*` leaves them real."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros = nn.Parameter(torch.zeros(WIDTH))
        self.ones = nn.Parameter(torch.ones(WIDTH))
        self.full = nn.Parameter(torch.full((WIDTH,), 3.0))
        self.eye = nn.Parameter(torch.eye(WIDTH))
        self.scaled = nn.Parameter(1e-6 * torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.ones + self.zeros) @ self.eye * self.full + self.scaled


class Buffers(nn.Module):
    """Buffers of every sort: persistent, computed and never stored, integer, scalar, None, one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("inverse_frequencies", 1.0 / 10000 ** (torch.arange(WIDTH) / WIDTH), persistent=False)
        self.register_buffer("original_frequencies", self.inverse_frequencies, persistent=False)
        self.register_buffer("order", torch.arange(WIDTH).flip(0))
        self.register_buffer("positions", torch.arange(WIDTH).expand(1, -1), persistent=False)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mask", torch.ones(WIDTH, dtype=torch.bool))
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = (self.linear(x) - self.mean) * self.mask
        return kept * self.inverse_frequencies + self.original_frequencies + self.positions + self.seen + self.order


class IntegerParameters(nn.Module):
    """Int8 and packed uint8 parameters, without gradients, beside their float scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
        self.packed = nn.Parameter(torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = torch.cat([self.packed & 15, self.packed >> 4], dim=1).to(x.dtype)
        return x @ (self.weight.to(x.dtype) + halves) * self.scale


class Float8Parameters(nn.Module):
    """Float8 weights of both formats with a float32 scale: casting to "the model's dtype" would destroy them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH).to(torch.float8_e4m3fn), requires_grad=False)
        self.wide = nn.Parameter(torch.zeros(WIDTH, WIDTH).to(torch.float8_e5m2), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) + self.wide.to(x.dtype)) * self.scale


class MixedDtypes(nn.Module):
    """bfloat16 layers around a float32 norm and a complex parameter: "auto" keeps every dtype as it is in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(WIDTH)
        self.phase = nn.Parameter(torch.ones(WIDTH, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(self.low(x.to(torch.bfloat16)).float()) * self.phase).real


class WeightNormed(nn.Module):
    """A weight-normed convolution: `weight` is computed from two parameters whose names hold `parametrizations`."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 1), dim=0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.convolution(x.unsqueeze(-1)).squeeze(-1))


class Symmetric(nn.Module):
    """Return the matrix's upper triangle, mirrored."""

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.triu() + matrix.triu(1).transpose(-1, -2)


class Parametrised(nn.Module):
    """A weight made symmetric by a parametrisation of one's own, stored as `parametrizations.weight.original`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.linear, "weight", Symmetric())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class BatchNormed(nn.Module):
    """Running statistics and an integer counter: buffers that training changes and that evaluation depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class FusedOnLoad(nn.Module):
    """An override of `_load_from_state_dict`: accepts `query`, `key` and `value` and stacks them into `fused`."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.empty(3 * WIDTH, WIDTH).normal_())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        parts = [state_dict.pop(f"{prefix}{part}", None) for part in ("query", "key", "value")]
        if all(part is not None for part in parts):
            state_dict[f"{prefix}fused"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def old_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the three tensors of the format that the override accepts."""
        return dict(zip(("query", "key", "value"), self.fused.detach().chunk(3), strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (x @ self.fused.T).chunk(3, dim=-1)
        return (query @ key.T).softmax(-1) @ value


class RenamedOnLoad(nn.Module):
    """A pre-hook of `load_state_dict`: files of an older release call `weight` `gamma`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}gamma" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}gamma")

    def old_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensor under the name that the hook accepts."""
        return {"gamma": self.weight.detach()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class DerivedOnLoad(nn.Module):
    """A post-hook of `load_state_dict` that fills a buffer from a parameter: binding past it leaves that stale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("norms", torch.zeros(WIDTH), persistent=False)
        self.register_load_state_dict_post_hook(self._derive)

    @staticmethod
    def _derive(module: DerivedOnLoad, incompatible: object) -> None:
        module.norms = module.linear.weight.detach().norm(dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) / (1 + self.norms)


class ExtraState(nn.Module):
    """State that is not a tensor, through `get_extra_state`: safetensors cannot hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Containers(nn.Module):
    """A ParameterList and a ParameterDict: names that are numbers, and modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(11)])
        self.gates = nn.ParameterDict({"in": nn.Parameter(torch.randn(WIDTH)), "out": nn.Parameter(torch.randn(WIDTH))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.gates["in"] + torch.stack(list(self.steps)).sum(0)) * self.gates["out"]


class Frozen(nn.Module):
    """A frozen half and a training half: `requires_grad` is the module's, not the file's."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x))


class Attention(nn.Module):
    """MultiheadAttention and an encoder layer's fast path: both read their children's weights without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequence = x.unsqueeze(0)
        return self.layer(self.attention(sequence, sequence, sequence)[0]).squeeze(0)


class Recurrent(nn.Module):
    """An LSTM: its `_flat_weights` list must hold the same parameters that its names do."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x.unsqueeze(0))[0].squeeze(0)


class Empty(nn.Module):
    """Tensors without elements beside real ones: no byte range, no address of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.empty(0, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.none, self.linear(x)])


NETS: tuple[type[nn.Module], ...] = (
    Plain,
    BareParameters,
    SharedModules,
    TiedParameters,
    ZerosAndOnes,
    Buffers,
    IntegerParameters,
    Float8Parameters,
    MixedDtypes,
    WeightNormed,
    Parametrised,
    BatchNormed,
    FusedOnLoad,
    RenamedOnLoad,
    DerivedOnLoad,
    ExtraState,
    Containers,
    Frozen,
    Attention,
    Recurrent,
    Empty,
)


def save_tokenizer(folder, words) -> None:
    """Save a tokenizer of whole words, the first of which ends a text and the second stands for unknown ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end, unknown = words[:2]
    split = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=split, unk_token=unknown, eos_token=end, pad_token=end).save_pretrained(
        folder
    )
