"""From a spec to its Plan: by the Layout and an activation estimate, or by a rehearsal of the engine's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import Fault, ModelError
from orchestrator.layout import lay_out, parameter_table, saved_bytes
from orchestrator.ledger import Entry, Ledger
from orchestrator.planner import device
from orchestrator.planner.activations import FP32
from orchestrator.planner.allocator import replay
from orchestrator.planner.candidates import typed
from orchestrator.planner.losses import LossCode
from orchestrator.planner.moments import GPU, card_moments, host_lines, largest, ledger_of
from orchestrator.planner.orders import orders
from orchestrator.planner.plan import LAYOUT, REHEARSAL, CardUse, Peak, Plan, Room
from orchestrator.planner.programme import FULL, Programme
from orchestrator.planner.rehearsal import Rehearsal, rehearse
from orchestrator.planner.roofline import COMPUTE, StepTime, step_time
from orchestrator.planner.trace import Trace
from orchestrator.spec import Engine, Home, ModelShape, Parameter, RunSpec, Shard, divided_table, stored
from orchestrator.units import MIB, align_up, dtype_bytes, format_bytes

LARGE_BLOCK = 2 * MIB
"""Requests above 1 MiB come in multiples of this from the driver (c10/core/AllocatorConfig.h)."""

Perform = Callable[[RunSpec, int, float, Programme], Rehearsal]
"""From (spec, rank, seconds that it may take, programme) to the rehearsal."""

CALIBRATION = (
    f"step times: computing at {COMPUTE.share} of the card's peaks ({COMPUTE.low} to {COMPUTE.high} in the recorded runs), "
    "links and host at theirs, not calibrated"
)


def table_for(spec: RunSpec) -> tuple[Parameter, ...]:
    """The parameters of the spec's model: from its dimensions, else from the module itself, built without storage."""
    table = parameter_table(spec)
    if table is not None:
        return table
    from orchestrator.engine.materialize import without_storage
    from orchestrator.model import build, table_of

    return table_of(build(spec, without_storage()))


def shape_for(spec: RunSpec) -> ModelShape:
    """The dimensions of the spec's model.

    Raises:
        ModelError: its config.json states none that are known here.
    """
    if spec.model.shape is None:
        problem = f"the dimensions of {spec.model.path} cannot be told from its config.json"
        remedy = "plan a model whose config.json states hidden_size and num_hidden_layers"
        raise ModelError(Fault("model.path", problem, remedy))
    return spec.model.shape


def _pinned(spec: RunSpec, table: Sequence[Parameter], lines: Mapping[str, int]) -> int:
    """Bytes that page-locking adds: torch's pinned allocator rounds each block up to a power of two (ATen/core/
    CachingHostAllocator.h). ZeRO pins flat buffers, FSDP2 each parameter; the moments stay pageable."""
    if not spec.strategy.pin_memory:
        return 0

    def waste(size: int) -> int:
        return (1 << (size - 1).bit_length()) - size if size > 0 else 0

    if spec.strategy.engine is Engine.FSDP:
        ranks, c = spec.strategy.dp_shard, dtype_bytes(spec.precision.compute)
        parts = divided_table(stored(table, spec.precision.compute), spec.strategy.tp)
        return sum(waste(p.numel // ranks * (FP32 if p.trainable else c)) for p in parts)
    largest_flat = spec.strategy.buckets.sub_group * 4 if spec.strategy.buckets else 0
    wasted = 0
    for line, size in lines.items():
        if line == "moments" or (line == "staging" and spec.strategy.nvme is not None):  # locked as it is
            continue
        whole, rest = divmod(size, largest_flat) if largest_flat else (0, size)
        wasted += whole * waste(largest_flat) + waste(rest)
    return wasted


def _host(spec: RunSpec, table: Sequence[Parameter], lines: Mapping[str, int], passing: int) -> Room:
    """Host memory of one rank: its process, what rests there, what is saved at once where that is more than what is `passing`
    at other times, and the rounding of what is page-locked."""
    sharded = spec.strategy.dp_shard if spec.strategy.shard is not Shard.NONE else 1
    parts = divided_table(table, spec.strategy.tp)
    saved = saved_bytes(spec.optimizer, [p for p in parts if p.trainable]) // sharded  # gathered to be written
    if not spec.checkpoint.background:
        saved = min(device.SAVED_AT_ONCE, saved)
    held = sum(lines.values()) + max(0, saved - passing)
    need = device.process_bytes(spec.cluster, spec.strategy.engine) + held + _pinned(spec, table, lines)
    return Room(need, device.host_share(spec.cluster))


def _disk(spec: RunSpec, need: int) -> Room:
    """NVMe of one rank; without need no limit."""
    return Room(need, device.nvme_share(spec.cluster) if need else 0)


def _notes(spec: RunSpec, time: StepTime | None) -> tuple[str, ...]:
    notes = []
    if time is not None:
        notes.append(CALIBRATION)
    elif spec.cluster.card.name == device.CPU:
        notes.append("no step time: the rates of this machine's processor are not known")
    else:
        notes.append(f"no step time: the rates of the card {spec.cluster.card.name} are not known")
    if spec.cluster.card.name != device.CPU and not spec.cluster.host_bytes:
        notes.append("host memory is not held against a limit: cluster.host_gib states it")
    elif spec.cluster.card.name != device.CPU and spec.cluster.name != "local":
        host = format_bytes(spec.cluster.host_bytes)
        notes.append(f"{host} of host memory, as machines like {spec.cluster.name} have: cluster.host_gib states another")
    if spec.strategy.nvme is not None:
        if time is not None and not spec.cluster.nvme_gb_per_s:
            rate = f"NVMe at {device.NVME_GB_PER_S:.1f} GB/s for each machine assumed"
            notes.append(f"{rate}: cluster.nvme_gb_per_s states it, a run measures it")
        if not spec.cluster.nvme_bytes:
            notes.append("NVMe is not held against a limit: cluster.nvme_gib states it")
    if spec.compile != "none":
        host = format_bytes(device.COMPILER_BYTES)
        less = "planned as if not compiled: compiled blocks keep less"
        notes.append(f"{less}, and the compiler takes some {host} of each rank's host memory")
    if spec.strategy.ranks > spec.cluster.cards_per_node:
        notes.append(f"{device.NETWORK_GB_PER_S:.1f} GB/s assumed between machines")
    return tuple(notes)


def _card(spec: RunSpec, allocated: int, reserved: int) -> CardUse:
    """The card in sum. On a machine without cards its share of the host memory is the card, and the process the context."""
    limit = spec.cluster.card.memory_bytes
    if spec.cluster.card.name == device.CPU:
        return CardUse(allocated, allocated, device.process_bytes(spec.cluster, spec.strategy.engine), 0, limit)
    over = device.overhead(spec.cluster, spec.strategy.ranks)
    return CardUse(allocated, reserved, over.context, over.communication, limit)


def _assemble(
    spec: RunSpec, table: Sequence[Parameter], basis: str, ledger: Ledger, memory: CardUse, peak: Peak, host: Room, nvme: Room
) -> Plan:
    time = step_time(spec, table, shape_for(spec))
    tokens = spec.batch.global_size * spec.data.seq_len
    label = spec.strategy.label if spec.recompute == "none" else f"{spec.strategy.label}+recompute"
    return Plan(
        label=label,
        words=typed(spec),
        model=spec.model.name,
        tuning=spec.tuning.label,
        cluster=spec.cluster.name,
        card=spec.cluster.card.name,
        ranks=spec.strategy.ranks,
        micro=spec.batch.micro,
        accumulation=spec.batch.accumulation,
        seq_len=spec.data.seq_len,
        compute=spec.precision.compute,
        basis=basis,
        ledger=ledger,
        memory=memory,
        peak=peak,
        host=host,
        nvme=nvme,
        time=time,
        tokens_per_second=tokens / time.total if time is not None and time.total else None,
        notes=_notes(spec, time),
        optimizer=spec.optimizer.name,
    )


def _largest_first(lines: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(lines.items(), key=lambda item: -item[1]))


def by_layout(spec: RunSpec, table: Sequence[Parameter] | None = None, rank: int = 0, loss: LossCode | None = None) -> Plan:
    """The Plan of `spec` from its Layout and the activation estimate: milliseconds, no torch for the known families."""
    table = table_for(spec) if table is None else table
    layout, shape = lay_out(spec, table, rank), shape_for(spec)
    moments = card_moments(spec, table, shape, layout, loss)
    fullest = largest(moments)
    elsewhere = {home: host_lines(spec, table, layout, home, shape) for home in (Home.CPU, Home.NVME)}
    passing = sum(elsewhere[Home.CPU].values()) - layout.rest_bytes(Home.CPU)
    host, nvme = _host(spec, table, elsewhere[Home.CPU], passing), _disk(spec, sum(elsewhere[Home.NVME].values()))
    memory = _card(spec, fullest.bytes, align_up(fullest.bytes, LARGE_BLOCK))
    if spec.cluster.card.name == device.CPU:  # one memory holds both
        inside = sum(elsewhere[Home.CPU].values())
        memory = _card(spec, fullest.bytes + inside, fullest.bytes + inside)
        host = Room(0, 0)
    peak = Peak(fullest.phase, fullest.what, _largest_first(fullest.lines))
    return _assemble(spec, table, LAYOUT, ledger_of(moments, elsewhere, rank), memory, peak, host, nvme)


def _rehearsed_ledger(result: Rehearsal, workspace: int) -> Ledger:
    """Bytes by phase and line as the trace found them at the peak of each phase."""
    entries: list[Entry] = []
    for home in ("gpu", "cpu"):
        for phase, peak in result.peaks[home].items():
            if not peak:
                continue
            lines: dict[str, int] = {}
            for item in result.trace.living(result.trace.peak_position(home, phase), home):
                lines[item.line] = lines.get(item.line, 0) + item.bytes
            entries += [Entry(phase, line, home, count) for line, count in lines.items()]
            if home == GPU and workspace and phase != "load":
                entries.append(Entry(phase, "workspace", home, workspace))
    return Ledger(result.rank, tuple(entries))


@dataclass(frozen=True, slots=True)
class _Replayed:
    """What torch's allocator makes of a trace; `notes` say where it only just fits."""

    allocated: int
    reserved: int
    notes: tuple[str, ...] = ()


def _allocator(trace: Trace, room: int) -> _Replayed:
    """The trace in torch's caching allocator, in its default mode, with `room` bytes to take from the driver."""
    free = replay(trace, expandable=False)
    if free.peak_reserved <= room:
        return _Replayed(free.peak_allocated, free.peak_reserved)
    capped = replay(trace, expandable=False, budget=room)
    if capped.fits:
        note = f"torch's allocator fits by giving cached memory back {capped.retries} times, which slows the steps"
        return _Replayed(capped.peak_allocated, capped.peak_reserved, (note,))
    # What is certainly missing: the live bytes; where those would fit, what fragments beside them.
    needed = free.peak_allocated if free.peak_allocated > room else free.peak_reserved
    return _Replayed(free.peak_allocated, needed)


def _replayed(result: Rehearsal, room: int, programme: Programme) -> _Replayed:
    """What the allocator makes of the rehearsal; of samples of several lengths, the middle one of several orders."""
    traces = orders(result.trace) if programme.lengths else (result.trace,)
    found = sorted((_allocator(trace, room) for trace in traces), key=lambda made: made.reserved)
    return found[len(found) // 2]


def _in_child(spec: RunSpec, rank: int, timeout: float, programme: Programme) -> Rehearsal:
    return rehearse(spec, rank, timeout=timeout, programme=programme)


def by_rehearsal(
    spec: RunSpec,
    table: Sequence[Parameter] | None = None,
    rank: int = 0,
    timeout: float = 600.0,
    perform: Perform = _in_child,
    programme: Programme = FULL,
) -> Plan:
    """The Plan of `spec` from running its engine on fake tensors as rank `rank` through `programme`: in a child process, unless
    `perform` says otherwise.

    Raises:
        RehearsalError: the engine could not be rehearsed within `timeout` seconds.
    """
    table = table_for(spec) if table is None else table
    result = perform(spec, rank, timeout, programme)
    over = device.overhead(spec.cluster, spec.strategy.ranks)
    ledger = _rehearsed_ledger(result, over.workspace)
    alive = ledger.lines(result.peak_phase, GPU)
    layout = lay_out(spec, table, rank)
    offloaded = result.host_peak_bytes
    notes: tuple[str, ...] = ()
    if spec.cluster.card.name == device.CPU:
        memory, host = _card(spec, result.peak_bytes + offloaded, 0), Room(0, 0)
    else:
        room = spec.cluster.card.memory_bytes - over.outside - over.workspace
        replayed = _replayed(result, room, programme)
        memory = _card(spec, replayed.allocated + over.workspace, replayed.reserved + over.workspace)
        notes = replayed.notes
        lines = {row.line: row.bytes for row in layout.at("step") if row.home is Home.CPU}
        need = device.process_bytes(spec.cluster, spec.strategy.engine) + offloaded + _pinned(spec, table, lines)
        host = Room(need, device.host_share(spec.cluster))
    peak = Peak(result.peak_phase, f"{result.basis} trace", _largest_first(alive))
    nvme = _disk(spec, layout.rest_bytes(Home.NVME))
    made = _assemble(spec, table, REHEARSAL, ledger, memory, peak, host, nvme)
    return replace(made, notes=(*made.notes, *notes))


def predict(spec: RunSpec, basis: str = LAYOUT, table: Sequence[Parameter] | None = None) -> Plan:
    """The Plan of `spec` on the asked `basis`."""
    return by_rehearsal(spec, table) if basis == REHEARSAL else by_layout(spec, table)
