"""Optimizers that update each rank's own part of every tensor, whatever it is a part of: plain tensors, shards, flat buffers.

Tensors are updated in chunks of `CHUNK` elements. That bounds the temporaries of what has no kernel in place, and keeps
bitsandbytes' kernels, which count elements in 32 bits, right on flat buffers of any size.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from orchestrator.engine.census import local
from orchestrator.engine.states import Codec, Elementwise, State
from orchestrator.errors import ConfigError, Fault
from orchestrator.layout.moments import CHUNK
from orchestrator.spec import Optimizer


class Rule(Protocol):
    """The arithmetic of one optimizer on one tensor of a rank."""

    @property
    def codec(self) -> Codec: ...

    def fresh(self, tensor: torch.Tensor) -> State:
        """The states of `tensor`, a whole one or a DTensor, before the first update; the counter apart."""
        ...

    def update(self, tensor: torch.Tensor, gradient: torch.Tensor | None, state: State, lr: float) -> None:
        """Update `tensor` in place; `state["step"]` counts this update. Without rows on this rank there is no gradient, and
        the rule only joins what all ranks do together."""
        ...


class Updater(torch.optim.Optimizer):
    """Runs a rule on every tensor that has a gradient."""

    def __init__(self, parameters: Iterable[torch.Tensor], rule: Rule, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "the engines compute gradients themselves"
        for group in self.param_groups:
            for parameter in group["params"]:
                own = local(parameter.detach())
                gradient = None if parameter.grad is None else local(parameter.grad)
                if not own.numel():
                    self.rule.update(parameter, None, {}, group["lr"])
                elif gradient is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= {"step": 0, **self.rule.fresh(parameter)}
                    state["step"] += 1
                    self.rule.update(parameter, gradient, state, group["lr"])


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive runs of at most `size` of `count` elements."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def like(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros in the shape of this rank's part of `tensor`, a plain tensor."""
    return torch.zeros_like(local(tensor.detach()), dtype=dtype, memory_format=torch.contiguous_format)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, as one run of elements that shares its memory."""
    return local(tensor.detach()).view(-1)


def kernels() -> Any:
    """bitsandbytes' operators. It is imported when an optimizer needs it, which takes two seconds.

    Raises:
        ConfigError: it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for inference that it has not found
    try:
        import bitsandbytes  # noqa: F401 - registers the operators
    except ImportError as error:
        problem = f"this optimizer needs bitsandbytes, which cannot be imported: {error}"
        raise ConfigError(Fault("optimizer", problem, "pip install bitsandbytes, or use optimizer=adamw_bf16")) from error
    return torch.ops.bitsandbytes


class Lion:
    """Lion (arXiv:2302.06675, algorithm 2): the sign of a mixture of momentum and gradient; one state. The kernel is
    bitsandbytes'."""

    codec = Elementwise(("exp_avg",))

    def __init__(self, spec: Optimizer) -> None:
        self.spec, self.kernels = spec, kernels()

    def fresh(self, tensor: torch.Tensor) -> State:
        return {"exp_avg": like(tensor)}

    def update(self, tensor: torch.Tensor, gradient: torch.Tensor | None, state: State, lr: float) -> None:
        if gradient is None:
            return
        weights, slopes, momentum = flat(tensor), gradient.reshape(-1), state["exp_avg"].view(-1)
        beta1, beta2 = self.spec.betas
        for part in chunks(weights.numel()):
            self.kernels.optimizer_update_32bit(
                "lion", slopes[part], weights[part], momentum[part], None, None, 0.0, 0.0, beta1, beta2, 0.0, 0.0,
                self.spec.eps, self.spec.weight_decay, state["step"], lr, 1.0, False,
            )  # fmt: skip


class AdamWBf16:
    """AdamW whose two states rest in bf16. They are rounded stochastically: with the usual rounding a second moment that moves
    by less than 1/256 of itself in a step would never move (arXiv:2010.06192, section 3)."""

    codec = Elementwise(("exp_avg", "exp_avg_sq"))

    def __init__(self, spec: Optimizer, seed: int) -> None:
        self.spec, self.seed = spec, seed

    def fresh(self, tensor: torch.Tensor) -> State:
        return {"exp_avg": like(tensor, torch.bfloat16), "exp_avg_sq": like(tensor, torch.bfloat16)}

    def update(self, tensor: torch.Tensor, gradient: torch.Tensor | None, state: State, lr: float) -> None:
        if gradient is None:
            return
        (beta1, beta2), step = self.spec.betas, state["step"]
        weights, slopes = flat(tensor), gradient.reshape(-1)
        first, second = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        root, rate = math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
        for part in chunks(weights.numel()):
            slope = slopes[part]
            mean = first[part].float().lerp_(slope, 1 - beta1)
            square = second[part].float().mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            divisor = square.sqrt().div_(root).add_(self.spec.eps)
            weights[part].mul_(1 - lr * self.spec.weight_decay).addcdiv_(mean, divisor, value=-rate)
            del divisor
            bits = random_bits(part.start, slope.numel(), zlib.crc32(f"{self.seed} {step}".encode()), slope.device)
            first[part].copy_(_up_or_down(mean, bits))
            second[part].copy_(_up_or_down(square, bits.bitwise_right_shift_(16)))


def random_bits(start: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """32 random bits, as int32, for each of the elements `start` to `start + count`: a hash of position and seed (lowbias32 of
    C. Wellons, nullprogram.com/blog/2018/07/31), so the same on every device and on ranks that hold copies."""

    def signed(value: int) -> int:
        return (value + 2**31) % 2**32 - 2**31

    bits = torch.arange(count, dtype=torch.int32, device=device).add_(signed(start + seed))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(signed(factor))
    return bits


def _up_or_down(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 `values` in place as numbers that bf16 holds exactly: each one of its two neighbours, the nearer the likelier.
    The lower 16 of `bits` decide: added below the bits that stay, they carry as often as the rest is large."""
    whole = values.view(torch.int32)
    whole.add_(bits.bitwise_and(0xFFFF)).bitwise_and_(-0x10000)
    return values
