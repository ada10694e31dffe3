"""What a plan knows of a chip: its memory, and how fast it reads and multiplies."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from kvjax.messages import nearest, shown
from kvjax.pallas_kernels.targets import TARGETS, Target

HERE = "here"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device, as a plan sees it.

    Attributes:
        name: one of `TARGETS`, or `here`.
        kind: `cpu`, `tpu` or `gpu`.
        memory: bytes that programs can have.
        bandwidth: bytes per second, if known.
        flops: of products in bfloat16 per second, if known.
        source: of these numbers.
    """

    name: str
    kind: str
    memory: int
    bandwidth: int | None
    flops: int | None
    source: str


def chip_of(device: str, memory: int | None = None) -> Chip:
    """The chip of a name.

    Args:
        device: one of `TARGETS`, or `here` for this machine's first device.
        memory: bytes, where only these may be used.

    Raises:
        ValueError: an unknown name (the nearest is named), or more memory than a chip
            of `TARGETS` gives to programs.
    """
    if not isinstance(device, str) or device not in (HERE, *TARGETS):
        raise ValueError(
            f"Unknown device {shown(device)}; expected one of {[HERE, *TARGETS]}, or "
            f"`memory` in bytes with {HERE!r}.{nearest(device, (HERE, *TARGETS))}"
        )
    chip = _here() if device == HERE else _known(TARGETS[device], device)
    if memory is None:
        return chip
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(
            f"`memory` must be a number of bytes, at least 1; got {shown(memory)}."
        )
    if device != HERE and memory > chip.memory:
        larger = [t.name for t in TARGETS.values() if t.usable_bytes >= memory]
        raise ValueError(
            f"programs on {device} can have {chip.memory:,} bytes of memory; got "
            f"memory={memory:,}. Give at most that"
            + (f", or one of {larger}." if larger else ", or several chips.")
        )
    return dataclasses.replace(chip, memory=memory, source="as given")


def _known(target: Target, name: str) -> Chip:
    return Chip(
        name=name,
        kind=target.backend,
        memory=target.usable_bytes,
        bandwidth=target.hbm_bandwidth,
        flops=target.bf16_flops,
        source=target.source,
    )


def _here() -> Chip:
    device: Any = jax.devices()[0]
    known = [t for t in TARGETS.values() if t.device_kind == device.device_kind]
    chip = _known(known[0], HERE) if known else None
    # Only some devices have statistics, and only some of these say a limit.
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = limit or (chip.memory if chip else _machine())
    return Chip(
        name=HERE,
        kind="gpu" if device.platform in ("cuda", "rocm") else device.platform,
        memory=memory,
        bandwidth=chip.bandwidth if chip else None,
        flops=chip.flops if chip else None,
        source=f"{device.device_kind}, as JAX and the system say",
    )


def _machine() -> int:
    """Bytes of memory of this machine, or of the group that this process is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(whole, int(said)) if said.isdecimal() else whole
