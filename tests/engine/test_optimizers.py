"""The optimizers by themselves: against the libraries' own, across chunks, and through a checkpoint's runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from contract.cases import Case, run_spec
from torch import nn

from orchestrator import spec as s
from orchestrator.engine import optimizers, updates
from orchestrator.engine.blockwise import nearest
from orchestrator.engine.optimizers import load, make_optimizer, pieces, scalars
from orchestrator.engine.states import Fragment
from orchestrator.layout.moments import BLOCK, STATES, Held, moment_rows, saved_bytes

STEPS = 3


def spec_for(name: str, **settings: float) -> s.RunSpec:
    spec = run_spec(Case("plain", "full", "fp32", 1), 1)
    return replace(spec, optimizer=s.Optimizer(name, 1e-2, weight_decay=0.1, **settings))


def tensors(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (f"model.layers.0.{index}.weight", nn.Parameter(torch.randn(shape, generator=generator)))
        for index, shape in enumerate(shapes)
    ]


def gradients(named: list[tuple[str, nn.Parameter]], step: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    for _, parameter in named:
        yield torch.randn(parameter.shape, generator=generator)


def train(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], steps: range = range(STEPS)) -> None:
    for step in steps:
        for (_, parameter), gradient in zip(named, gradients(named, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def adafactor(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.1)


def lion(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion

    return Lion(parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)


def eight_bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2, weight_decay=0.1)


def muon(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize(
    ("name", "library", "shapes", "apart"),
    [
        ("adafactor", adafactor, ((40, 30), (130,)), 1e-6),
        ("lion", lion, ((40, 30), (130,)), 0.0),
        ("adamw_8bit", eight_bit, ((90, 70), (130,)), 0.0),
        ("muon", muon, ((40, 30), (20, 60)), 0.0),
    ],
)
def test_equals_the_librarys_own(
    name: str,
    library: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    shapes: tuple[tuple[int, ...], ...],
    apart: float,
) -> None:
    ours, theirs = tensors(*shapes), tensors(*shapes)
    train(make_optimizer(ours, spec_for(name)), ours)
    train(library([parameter for _, parameter in theirs]), theirs)
    for (_, own), (_, other) in zip(ours, theirs, strict=True):
        assert float((own - other).detach().abs().max()) <= apart


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit", "lion"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tensors((90, 70)), tensors((90, 70))
    train(make_optimizer(whole, spec_for(name)), whole)
    monkeypatch.setattr(updates.chunks, "__defaults__", (4 * BLOCK,))
    monkeypatch.setattr("orchestrator.engine.adafactor.CHUNK", 4 * BLOCK)
    train(make_optimizer(parts, spec_for(name)), parts)
    torch.testing.assert_close(whole[0][1], parts[0][1], rtol=1e-6, atol=1e-7)


def test_bf16_states_follow_fp32_ones_and_never_stand_still() -> None:
    """A second moment of 1 with gradients of 0.9 moves by 0.0002 a step, a twentieth of bf16's spacing there."""
    exact, rounded = tensors((64, 64)), tensors((64, 64))
    made = [make_optimizer(exact, spec_for("adamw")), make_optimizer(rounded, spec_for("adamw_bf16"))]
    for optimizer, named in zip(made, (exact, rounded), strict=True):
        for _ in range(200):
            named[0][1].grad = torch.full((64, 64), 0.9)
            optimizer.step()
    moments = [optimizer.state[named[0][1]]["exp_avg_sq"] for optimizer, named in zip(made, (exact, rounded), strict=True)]
    assert moments[1].dtype == torch.bfloat16
    assert float(moments[1].float().mean()) == pytest.approx(float(moments[0].mean()), rel=5e-3)


def test_stochastic_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    values = torch.full((1 << 16,), -1.0 - 2**-10)  # an eighth of the way from -1 to its neighbour, -1 - 2^-7
    rounded = updates._up_or_down(values.clone(), updates.random_bits(0, values.numel(), 5, values.device))
    assert set(rounded.unique().tolist()) == {-1.0, -1.0 - 2**-7}
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert float((rounded == -1.0).float().mean()) == pytest.approx(7 / 8, abs=0.01)
    both = updates.random_bits(0, 1 << 16, 5, values.device)
    high, low = both >> 16 & 0xFFFF, both & 0xFFFF
    correlation = float(torch.corrcoef(torch.stack([high.double(), low.double()]))[0, 1])
    assert abs(correlation) < 0.02


def fragments(named: list[tuple[str, nn.Parameter]]) -> list[Fragment]:
    return [Fragment(name, tuple(p.shape), p, 0, 0, p.numel()) for name, p in named]


@pytest.mark.parametrize("name", sorted(set(STATES) - {"paged_adamw_8bit"}))
def test_a_state_goes_through_runs_and_back_bitwise(name: str) -> None:
    named, again = tensors((90, 70), (130,)), tensors((90, 70), (130,))
    spec = spec_for(name)
    optimizer, other = make_optimizer(named, spec), make_optimizer(again, spec)
    train(optimizer, named)
    kept = {(p.name, p.kind): (p.start, p.data.clone()) for p in pieces(optimizer, fragments(named), owned=True)}
    counted = scalars(optimizer, spec, 1.0)

    def read(parameter: str, kind: str, start: int, stop: int) -> torch.Tensor:
        first, data = kept[parameter, kind]
        return data[start - first : stop - first]

    load(other, spec, [p for _, p in again], fragments(again), read, counted)
    for optimizer_, held in ((optimizer, named), (other, again)):
        train(optimizer_, held, range(STEPS, 2 * STEPS))
    for (_, first), (_, second) in zip(named, again, strict=True):
        assert torch.equal(first, second)


def test_eight_bit_values_without_their_scales_come_back_to_within_a_code() -> None:
    """What another strategy wrote: the scales are found anew, from the values."""
    named, again = tensors((90, 70)), tensors((90, 70))
    spec = spec_for("adamw_8bit")
    optimizer, other = make_optimizer(named, spec), make_optimizer(again, spec)
    train(optimizer, named)
    kept = {p.kind: p.data.clone() for p in pieces(optimizer, fragments(named), owned=True)}
    counted = scalars(optimizer, spec, 1.0) | {"geometry": -1.0}
    load(other, spec, [p for _, p in again], fragments(again), lambda n, kind, a, b: kept[kind][a:b], counted)
    found = {p.kind: p.data for p in pieces(other, fragments(again), owned=True)}
    for kind in ("exp_avg", "exp_avg_sq"):
        assert float((found[kind] - kept[kind]).abs().max() / kept[kind].abs().max()) < 0.02


def test_codes_are_found_again_whatever_the_scale() -> None:
    book = torch.tensor(sorted({-0.9930, -0.5, 0.0, 0.1, 0.5, 1.0}))
    codes = torch.randint(0, len(book), (3 * BLOCK - 7,), generator=torch.Generator().manual_seed(3))
    scales = torch.tensor([1e-12, 3.7, 0.0])
    values = book[codes] * scales.repeat_interleave(BLOCK)[: len(codes)]
    found = nearest(values, scales, book)
    assert torch.equal(found[: 2 * BLOCK].long(), codes[: 2 * BLOCK])
    assert float(book[found[2 * BLOCK :].long()].abs().max()) == 0.0


@pytest.mark.parametrize("name", sorted(set(STATES) - {"paged_adamw_8bit"}))
def test_rows_are_the_states_to_the_element(name: str) -> None:
    shapes = ((90, 70), (130,))
    named = tensors(*shapes)
    optimizer = make_optimizer(named, spec_for(name))
    train(optimizer, named, range(1))
    ((_, _, paged), (_, _, states)) = optimizers.live_states(optimizer, s.Home.GPU)
    held = [Held(shape, hidden=len(shape) == 2) for shape in shapes]
    rows = moment_rows(s.Optimizer(name, 1.0), held, s.Home.GPU)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in states if t.numel() > 1}
    assert not paged
    assert sum(row.bytes for row in rows) == sum(storages.values())


def test_paged_codes_count_on_the_host() -> None:
    rows = moment_rows(s.Optimizer("paged_adamw_8bit", 1.0), [Held((1000, 1000)), Held((200, 200))], s.Home.GPU)
    found = {(row.dtype, row.home): row.elements for row in rows}
    assert found["uint8", s.Home.CPU] == 2_000_000
    assert found["uint8", s.Home.GPU] == 80_000


def test_a_checkpoint_is_as_large_as_foretold() -> None:
    for name in sorted(set(STATES) - {"paged_adamw_8bit"}):
        named = tensors((90, 70), (130,))
        optimizer = make_optimizer(named, spec_for(name))
        train(optimizer, named, range(1))
        written = sum(p.data.nbytes for p in pieces(optimizer, fragments(named), owned=True))
        table = [s.Parameter(key, tuple(p.shape), 0) for key, p in named]
        assert written == saved_bytes(s.Optimizer(name, 1.0), table), name
