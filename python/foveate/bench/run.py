"""Cases -> rows: each case is checked, then timed beside its peers, then held against the limits of the machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foveate.bench import cases, memory, timing, workloads
from foveate.bench.check import check
from foveate.bench.roofline import Limits


@dataclass(frozen=True)
class Row:
    """One case beside one peer (peer "" without any). Times in microseconds; None where there is nothing to say."""

    bench: str
    case: str
    dtype: str
    us: float | None = None
    spread_us: float | None = None  # interquartile range
    samples: int | None = None
    rate: float | None = None  # of our function, in `unit`
    unit: str = ""
    limit: float | None = None  # of the machine, measured in the same run, in `unit`
    percent_of_limit: float | None = None
    error_share: float | None = None  # of the tolerance
    peak_mib: float | None = None
    peer: str = ""
    peer_us: float | None = None
    peer_spread_us: float | None = None
    peer_peak_mib: float | None = None
    ratio: float | None = None  # the peer's time (or memory) over ours: above 1 we are ahead
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """All cases of one bench, dtype and peer."""

    bench: str
    dtype: str
    peer: str
    cases: int
    mean_ratio: float  # geometric
    min_ratio: float
    mean_percent_of_limit: float | None
    min_percent_of_limit: float | None


@dataclass(frozen=True)
class Options:
    benches: Sequence[str]
    dtypes: Sequence[str] = ("fp32", "bf16")
    peers: bool = True
    quick: bool = False
    seed: int = 0

    def peers_of(self, bench: str) -> Sequence[str]:
        return workloads.PEERS[bench] if self.peers else ()


def rows(options: Options, limits: Limits) -> Iterator[Row]:
    """One after the other, as they are measured. Raises check.WrongResult before a wrong function is timed."""
    for bench in options.benches:
        todo = cases.BENCHES[bench](options.quick, options.dtypes)
        if bench == "memory":
            yield from _memory_rows(todo, options, limits.threads)
            continue
        for case in todo:
            yield from _timed_rows(bench, case, options, limits)


def _timed_rows(bench: str, case: cases.Case, options: Options, limits: Limits) -> Iterator[Row]:
    missing = workloads.missing_bytes(case)
    if missing:
        yield Row(bench, case.name, case.dtype, note=f"skipped: {missing / 2**30:.1f} GiB of memory are missing")
        return
    workload = workloads.build(bench, case, options.seed, options.quick)
    share = check(f"{bench} {case.name} {case.dtype}", workload.results())
    names = options.peers_of(bench)
    ours, *peers = timing.interleaved(
        [workload.ours, *(workload.peers[name] for name in names)],
        timing.QUICK if options.quick else timing.Budget(),
        workload.min_sample_seconds,
    )
    row = Row(bench, case.name, case.dtype, ours.median * 1e6, ours.iqr * 1e6, ours.samples, error_share=share)
    if workload.limit:
        rate, limit = workload.work / ours.median / 1e9, getattr(limits, workload.limit)
        row = dataclasses.replace(row, rate=rate, unit=workload.unit, limit=limit, percent_of_limit=100 * rate / limit)
    if not peers:
        yield row
    for name, peer in zip(names, peers):
        yield dataclasses.replace(
            row,
            peer=name,
            peer_us=peer.median * 1e6,
            peer_spread_us=peer.iqr * 1e6,
            ratio=peer.median / ours.median,
        )


def _memory_rows(todo: Sequence[cases.Case], options: Options, threads: int) -> Iterator[Row]:
    """Peaks by length, then for each dtype a row with the exponent of their growth."""
    names = options.peers_of("memory")
    for dtype in options.dtypes:
        own = [case for case in todo if isinstance(case, cases.MemoryCase) and case.dtype == dtype]
        peaks = []
        for case in own:
            peak = memory.measure(case, "foveate", threads)
            peaks.append(peak)
            row = Row("memory", case.name, dtype, peak_mib=peak / 2**20)
            if not names:
                yield row
            for name in names:
                theirs = memory.measure(case, name, threads)
                yield dataclasses.replace(row, peer=name, peer_peak_mib=theirs / 2**20, ratio=theirs / peak)
        exponent = memory.growth_exponent([case.S for case in own], peaks)
        yield Row("memory", "growth with S", dtype, rate=exponent, unit="exponent", note="1: linear; 2: stored scores")


def summarize(measured: Sequence[Row]) -> list[Summary]:
    """Geometric means, one line for each bench, dtype and peer in the order of the rows."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in measured:
        if row.ratio is not None:
            groups.setdefault((row.bench, row.dtype, row.peer), []).append(row)
    out = []
    for (bench, dtype, peer), members in groups.items():
        ratios = [row.ratio for row in members if row.ratio is not None]
        percents = [row.percent_of_limit for row in members if row.percent_of_limit is not None]
        out.append(
            Summary(
                bench,
                dtype,
                peer,
                len(members),
                geometric_mean(ratios),
                min(ratios),
                geometric_mean(percents) if percents else None,
                min(percents) if percents else None,
            )
        )
    return out


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
