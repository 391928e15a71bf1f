"""What the planner knows of a machine: rates, latencies and memory of one device and its links, each with a source."""

from __future__ import annotations

import dataclasses
import difflib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from seesaw_ds.errors import UserError

GIB = 1 << 30

Points = tuple[tuple[float, float], ...]
"""(size, seconds), both rising; at least two."""


def interpolate(points: Points, size: float) -> float:
    """Seconds at `size`: on a straight line between points, along the last slope beyond; at least the first's."""
    index = min(max(bisect_right(points, (size,)), 1), len(points) - 1)
    (low, seconds), (high, next_seconds) = points[index - 1], points[index]
    return max(points[0][1], seconds + (size - low) * (next_seconds - seconds) / (high - low))


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One kind of device and how several of them are joined. Rates are in units per second, without any saving.

    device                     its name as the driver gives it, by which a run finds its profile
    memory_bytes               of one device
    flops                      peak dense FLOP/s by dtype name, from the data sheet
    memory_bandwidth           peak bytes/s of device memory, from the data sheet
    gemm_efficiency            share of the peak FLOP/s that large matrix products reach
    attention_efficiency       share of the peak FLOP/s that causal prefill attention reaches
    memory_efficiency          share of the peak bandwidth that weights and KV are read at
    layer_seconds              launches and gaps between kernels, per decoder layer and step
    step_seconds               from a step's end until the next one of its rows can begin: host work that nothing hides
    all_reduce                 by number of devices: (bytes, seconds) points, rising; straight lines between them
    send_seconds               latency of one send between two devices
    send_bandwidth             bytes/s of one send
    host_to_device             bytes/s from pinned host memory, all devices copying at once, per device
    device_to_host             the other way
    duplex                     bytes/s each way, per device, while both ways are busy
    sources                    where each of the figures above is from, by its name

    What a calibration measures besides; a data sheet leaves them out.

    linear                     by dtype: (tokens, seconds) points of a pass through one parameter; else the roofline
    row_linear                 by dtype: as `linear`, of steps of few tokens by this engine's own kernels
    row_all_reduce             by number of devices: as `all_reduce`, what steps of so few rows wait for one
    row_layer_seconds          as `layer_seconds`, of such steps; else the same
    kv_bandwidth               bytes/s at which decode attention reads KV; else that of weights
    pads_decode                1 when decode attention reads every row as if it were as long as the step's longest
    element_bandwidth          bytes/s of norms, activations and residual additions; else that of weights
    row_seconds                host work per sampled row, beside that per step; else nothing
    least_step_seconds         the shortest that a step is in a stage, however little the device has to do: host work
                               that is done while the device computes the step before; else nothing
    exchange_bandwidth         bytes/s each way of weights and KV that change places; else that of a send
    runtime_bytes              of a device's memory: what CUDA, NCCL and the engine's own buffers take; else nothing
    """

    name: str
    device: str
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bandwidth: float
    gemm_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    layer_seconds: float
    step_seconds: float
    all_reduce: Mapping[int, Points]
    send_seconds: float
    send_bandwidth: float
    host_to_device: float
    device_to_host: float
    duplex: float
    sources: Mapping[str, str]
    linear: Mapping[str, Points] | None = None
    row_linear: Mapping[str, Points] | None = None
    row_all_reduce: Mapping[int, Points] | None = None
    row_layer_seconds: float | None = None
    kv_bandwidth: float | None = None
    pads_decode: float | None = None
    element_bandwidth: float | None = None
    row_seconds: float = 0.0
    least_step_seconds: float = 0.0
    exchange_bandwidth: float | None = None
    runtime_bytes: int = 0

    def all_reduce_seconds(self, num_bytes: float, degree: int, has_few_rows: bool = False) -> float:
        """Seconds to sum `num_bytes` over `degree` devices: between the table's points, or along its last slope.

        A degree that is not in the table takes the next larger one's, or the largest there is. With few rows, that is
        where `row_linear` holds, `row_all_reduce` comes first.
        """
        if degree == 1:
            return 0.0
        if has_few_rows and self.row_all_reduce is not None and degree in self.row_all_reduce:
            return interpolate(self.row_all_reduce[degree], num_bytes)
        known = [size for size in self.all_reduce if size >= degree] or [max(self.all_reduce)]
        return interpolate(self.all_reduce[min(known)], num_bytes)

    def with_all_reduce_scaled(self, factor: float) -> HardwareProfile:
        """The same machine with an all-reduce bandwidth `factor` times as high; its latency stays."""
        row_all_reduce = None if self.row_all_reduce is None else _scaled(self.row_all_reduce, factor)
        return dataclasses.replace(self, all_reduce=_scaled(self.all_reduce, factor), row_all_reduce=row_all_reduce)


def _scaled(all_reduce: Mapping[int, Points], factor: float) -> dict[int, Points]:
    """`factor` times the bandwidth; the latency, which is the first point's, stays."""
    return {
        degree: tuple((size, points[0][1] + (seconds - points[0][1]) / factor) for size, seconds in points)
        for degree, points in all_reduce.items()
    }


def load_hardware(path: Path) -> HardwareProfile:
    """Read a profile. Raises UserError for a file that cannot be read and for any figure unknown, missing or wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"hardware={str(path)!r}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"hardware={str(path)!r}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"hardware={str(path)!r}: must hold figures as key: value")
    return parse_hardware(values)


def parse_hardware(values: Mapping[str, Any]) -> HardwareProfile:
    """Make a profile of a YAML mapping. Raises UserError naming the first figure that is unknown, missing or wrong."""
    fields = dataclasses.fields(HardwareProfile)
    names = [field.name for field in fields]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"known figures: {', '.join(names)}"
            raise UserError(f"{key}={values[key]!r}: unknown figure in a hardware profile; {mend}")
    for field in fields:
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{field.name}: missing in the hardware profile; every figure is needed")
    checked = {name: _figure(name, value) for name, value in values.items()}
    for name in ("memory_bytes", "runtime_bytes"):
        if name in checked:
            checked[name] = int(checked[name])
    for name in checked:
        if name not in ("name", "device", "sources") and name not in checked["sources"]:
            raise UserError(f"sources: {name} has none; say where the figure is from")
    for name in ("gemm_efficiency", "attention_efficiency", "memory_efficiency"):
        if checked[name] > 1:
            raise UserError(f"{name}={checked[name]}: a share of the peak, must be at most 1")
    return HardwareProfile(**checked)


def _figure(name: str, value: Any) -> Any:
    """The checked value of one figure."""
    if name in ("name", "device"):
        return str(value)
    if name == "flops":
        return {str(k): _positive(f"flops.{k}", v) for k, v in _mapping(name, value).items()}
    if name in ("all_reduce", "row_all_reduce"):
        return {int(k): _points(f"{name}.{k}", v) for k, v in _mapping(name, value).items()}
    if name in ("linear", "row_linear"):
        return {str(k): _points(f"{name}.{k}", v) for k, v in _mapping(name, value).items()}
    if name == "sources":
        return {str(k): str(v) for k, v in _mapping(name, value).items()}
    return _positive(name, value)


def _mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{name}={value!r}: must be a mapping with at least one entry")
    return value


def _positive(name: str, value: Any) -> float:
    """YAML reads 1e12 as text, for want of a dot; such text is a number here."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise UserError(f"{name}={value!r}: must be a number above 0")
    return number


def _points(name: str, value: Any) -> Points:
    rule = f"{name}={value!r}: must be at least two [size, seconds] points, both rising"
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(p, list) and len(p) == 2 for p in value):
        raise UserError(rule)
    points = tuple((float(size), float(seconds)) for size, seconds in value)
    for (size, seconds), (next_size, next_seconds) in pairwise(points):
        if not (0 <= size < next_size and 0 < seconds < next_seconds):
            raise UserError(rule)
    return points
