"""One dispatcher for all ops: which implementation serves a call, and why not.

An op is a package of this folder; its modules `reference`, `xla`, `tpu` and `gpu` each
hold a function with the name of the op and one signature: the record of bound arguments
in the op's `args` and, for a kernel, `tiles` and `interpret`. They are imported when
they are first chosen: a CPU never imports Mosaic.
"""

import dataclasses
import functools
import importlib
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
from jax.sharding import AxisType

from kvjax import axes
from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.mapped import mapped
from kvjax.pallas_kernels.targets import TARGETS

Backend = Literal["auto", "reference", "xla", "tpu", "gpu"]
BACKENDS = ("auto", "reference", "xla", "tpu", "gpu")

Tiles = Mapping[str, Any] | str | None
"""Block sizes; the name of a chip of `targets`, for its own; None for those of the chip
that the program is for."""

# What the automatic choice tries, in order, by platform.
PREFERENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cuda": ("gpu", "xla")}
)

_log = logging.getLogger("kvjax.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """A kernel with its implementations.

    Attributes:
        name: of the op, of its package and of the function in each of its modules.
        backends: those that exist, `reference` always among them.
        gives: letters of the arrays that it returns. What it takes is annotated. An
            op with these is split over a mesh along rows and KV heads, each device
            running its kernel; None: it is not.
    """

    name: str
    backends: tuple[str, ...]
    gives: tuple[str, ...] | None = None

    def implementation(self, backend: str) -> Any:
        """The function of one backend.

        Raises:
            NotImplementedError: the op has no such implementation.
        """
        if backend not in self.backends:
            raise NotImplementedError(
                f"{self.name} has no `{backend}` implementation; it has "
                f"{', '.join(self.backends)}."
            )
        module = importlib.import_module(f"{__package__}.{self.name}.{backend}")
        return getattr(module, self.name)

    def __call__(
        self,
        *args: Any,
        backend: Backend = "auto",
        tiles: Tiles = None,
        interpret: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the op; its `api` has validated and bound the arguments.

        Args:
            args: the record of the call; of an op too small for one, its arrays.
            backend: an explicit choice is followed or refused, never replaced;
                `auto` takes the first of `PREFERENCE` that serves the call and logs
                every refusal. In a program that XLA's partitioner splits over devices
                a kernel runs on each device for its rows and heads, where the mesh has
                rules (`kvjax.axes`) and the op knows its axes; elsewhere the XLA path
                is taken, the only one that the partitioner can split.
            tiles: block sizes of a Pallas backend, those left out being the tuned ones
                of the chip that the trace is for; or the name of a chip.
            interpret: run a Pallas backend in its interpreter, on any machine.
            kwargs: static settings of an op without a record.

        Raises:
            ValueError: unknown backend, block size or chip.
            NotImplementedError: the explicit backend does not serve this call, with
                the reason.
        """
        if backend not in BACKENDS:
            raise ValueError(
                f"`backend` must be one of {list(BACKENDS)}; got {backend!r}."
            )
        if backend != "auto":
            return self._run(backend, args, kwargs, tiles, interpret)
        whole = partitioned() and not self._splits
        choices = ("xla",) if whole else PREFERENCE.get(platform(), ("xla",))
        for name in choices:
            if name == "xla":
                break
            try:
                return self._run(name, args, kwargs, tiles, interpret)
            except NotImplementedError as refusal:
                _report(self.name, name, str(refusal))
        name = "xla" if "xla" in self.backends else "reference"
        return self._run(name, args, kwargs, None, False)

    @property
    def _splits(self) -> bool:
        """Whether a kernel of it runs on the devices of this trace's mesh."""
        return self.gives is not None and axes.mesh() is not None

    def _run(self, backend, args, kwargs, tiles, interpret):
        run = self.implementation(backend)
        if backend in ("tpu", "gpu"):
            sizes = block_sizes(self.name, backend, tiles)
            how = {**kwargs, "tiles": sizes, "interpret": interpret}
            if self._splits:
                assert self.gives is not None
                plain = functools.partial(self.implementation("reference"), **kwargs)
                kernel = functools.partial(run, **how)
                return mapped(kernel, plain, self.gives, *args)
            kwargs = how
        elif interpret or tiles is not None:
            raise ValueError(
                f"`tiles` and `interpret` are for the Pallas backends; got "
                f"backend={backend!r}. Choose 'tpu' or 'gpu'."
            )
        return run(*args, **kwargs)


def platform() -> str:
    """Platform that the current trace is for: the mesh's, or the default device's."""
    device = _mesh_device()
    return device.platform if device is not None else jax.default_backend()


def partitions() -> int:
    """Devices that the partitioner spreads the current trace over; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind == AxisType.Auto)


def partitioned() -> bool:
    """Whether the current trace is left to the partitioner on several devices."""
    return partitions() > 1


def _mesh_device() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return getattr(mesh, "abstract_device", None)


def chip() -> str | None:
    """The target that the current trace is for, None for hardware not listed there."""
    kind = (_mesh_device() or jax.devices()[0]).device_kind
    return next((t.name for t in TARGETS.values() if t.device_kind == kind), None)


def block_sizes(op: str, backend: str, tiles: Tiles) -> Mapping[str, Any] | None:
    """What a kernel is given: `tiles` over the tuned sizes of the chip.

    A kernel never asks which chip there is. Without one, or without tuned sizes for it,
    the kernel's own defaults serve.

    Raises:
        ValueError: an unknown chip, or one that the backend is not for.
    """
    if isinstance(tiles, str):
        known = [t.name for t in TARGETS.values() if t.backend == backend]
        if tiles not in known:
            raise ValueError(
                f"`tiles` must be block sizes, or one of {known} with "
                f"backend={backend!r}; got {tiles!r}."
            )
        return tuning.tiles(op, tiles)
    name = chip()
    if name is None or name not in tuning.table(op):
        return tiles
    return tuning.tiles(op, name, tiles) if TARGETS[name].backend == backend else tiles


@functools.cache  # once per reason, not once per layer and step
def _report(op: str, backend: str, reason: str) -> None:
    _log.warning("%s: `%s` refused, the XLA path is used: %s", op, backend, reason)
