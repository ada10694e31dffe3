"""Logits that are not finite choose no token, and say so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.axes import as_numpy
from kvjax.models.arrays import is_traced


def check_logits(dtype: Any, logits: jax.Array | np.ndarray, where: str = "") -> None:
    """No row of logits has NaN or infinity, other than tokens ruled out by `-inf`.

    Args:
        dtype: of the model.
        logits: `[..., V]`; not looked at where they are traced.
        where: which ones, for the message.

    Raises:
        ValueError: they are not, so that no token can be chosen by them.
    """
    if not is_traced(logits):
        check_rows(dtype, jnp.isfinite(jnp.max(logits, axis=-1)), where)


def check_rows(dtype: Any, rows: jax.Array | np.ndarray, where: str = "") -> None:
    """`check_logits`, of rows of which that is known."""
    if is_traced(rows) or (values := as_numpy(rows)).all():
        return
    first = int(np.argmin(values.reshape(len(values), -1).all(axis=1)))
    dtype = jnp.dtype(dtype).name
    raise ValueError(
        f"the model's logits{where} are not finite (row {first} of {len(values)}): no "
        f"token can be chosen by them. It computes in {dtype}"
        + (
            ", whose largest number is 65504. Load it with dtype='bfloat16' or "
            "'float32'."
            if dtype == "float16"
            else ". Its weights may hold NaN or overflow, as those of a diverged run "
            "do, or be meant for another dtype: load it with dtype='bfloat16' or "
            "'float32'."
        )
    )
