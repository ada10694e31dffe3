"""Keys or values of several pages in a TPU kernel, each page a block of its own."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp

from kvjax.pallas_kernels.decoding.sides import LANES, Side, widened
from kvjax.pallas_kernels.quantized import Quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageSide(Side):
    """A `Side` whose block is `pages` pages, joined in VMEM.

    What is a reference there is a list of references here, one per page.
    """

    pages: int = 1

    @classmethod
    def of_pool(cls, name: str, pool: Any, pages: int, q_dtype: Any) -> Self:
        """The description of a pool.

        Raises:
            NotImplementedError: the arithmetic does not exist, or groups of slots
                straddle products.
        """
        if not isinstance(pool, Quantized) and pool.dtype == jnp.float16:
            raise NotImplementedError(
                f"paged_decode: `{name}` is float16, which a TPU does not load."
            )
        if q_dtype == jnp.float16:
            raise NotImplementedError(
                "paged_decode: `q` is float16, which a TPU does not load."
            )
        try:
            side = cls.of(name, pool, pages * pool.shape[1], q_dtype)
        except NotImplementedError as refusal:
            reason = str(refusal).partition(": ")[2]
            raise NotImplementedError(f"paged_decode: {reason}") from None
        return dataclasses.replace(side, pages=pages)

    @property
    def columns(self) -> bool:
        """As a `Side`, but for pages shorter than the lanes.

        Those lie with the pages along the lanes, and are turned over in any case.
        """
        return self.packed % LANES != 0 and self.block // self.pages % LANES == 0

    def page_specs(self, at: Any) -> list:
        """Blocks of one page; `at` maps the grid to (page, 0, 0)."""
        one = dataclasses.replace(self, block=self.block // self.pages, pages=1)
        return one.specs(at)

    def _codes(self, ref):
        codes = [super(PageSide, self)._codes(one) for one in ref]
        return jnp.concatenate(codes, axis=1 if self.columns else 0)

    def _scales(self, refs):
        along = 1 if self.axis == "token" else 0
        scale = jnp.concatenate([widened(r) for r in refs[1]], axis=along)
        if self.symmetric:
            assert self.bits is not None
            return scale, -((2**self.bits - 1) // 2) * scale
        return scale, jnp.concatenate([widened(r) for r in refs[2]], axis=along)
