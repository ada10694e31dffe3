"""One dispatcher for all ops: which implementation serves a call, and why not.

An op is a package of this folder; its modules `reference`, `xla`, `tpu` and `gpu` each
hold a function with the name of the op and one signature. They are imported when they
are first chosen: a CPU never imports Mosaic.
"""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax

Backend = Literal["auto", "reference", "xla", "tpu", "gpu"]
BACKENDS = ("auto", "reference", "xla", "tpu", "gpu")

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
    """

    name: str
    backends: tuple[str, ...]

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
        tiles: Any = None,
        interpret: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the op; its `api` has validated the arguments.

        Args:
            args: arrays.
            backend: an explicit choice is followed or refused, never replaced;
                `auto` takes the first of `PREFERENCE` that serves the call and logs
                every refusal.
            tiles: block sizes of a Pallas backend; None takes the tuned ones.
            interpret: run a Pallas backend in its interpreter, on any machine.
            kwargs: static settings of the op.

        Raises:
            ValueError: unknown backend.
            NotImplementedError: the explicit backend does not serve this call, with
                the reason.
        """
        if backend not in BACKENDS:
            raise ValueError(
                f"`backend` must be one of {list(BACKENDS)}; got {backend!r}."
            )
        if backend != "auto":
            return self._run(backend, args, kwargs, tiles, interpret)
        here = platform()
        for name in PREFERENCE.get(here, ("xla",)):
            if name == "xla":
                break
            try:
                return self._run(name, args, kwargs, tiles, interpret)
            except NotImplementedError as refusal:
                _report(self.name, name, str(refusal))
        name = "xla" if "xla" in self.backends else "reference"
        return self._run(name, args, kwargs, None, False)

    def _run(self, backend, args, kwargs, tiles, interpret):
        run = self.implementation(backend)
        if backend in ("tpu", "gpu"):
            kwargs = {**kwargs, "tiles": tiles, "interpret": interpret}
        elif interpret or tiles is not None:
            raise ValueError(
                f"`tiles` and `interpret` are for the Pallas backends; got "
                f"backend={backend!r}. Choose 'tpu' or 'gpu'."
            )
        return run(*args, **kwargs)


def platform() -> str:
    """Platform that the current trace is for: the mesh's, or the default device's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


@functools.cache  # once per reason, not once per layer and step
def _report(op: str, backend: str, reason: str) -> None:
    _log.warning("%s: `%s` refused, the XLA path is used: %s", op, backend, reason)
