"""What a row says besides its measurements: the cell, the model, the versions."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvjax.eval.config import EvalConfig
from kvjax.eval.header import SCHEMA
from kvjax.eval.plan import Cell
from kvjax.inputs import Inputs, untouched
from kvjax.models import origins
from kvjax.models.decoder import Decoder

SAMPLED = 16
"""Length of a fingerprint that looked at samples of the weights alone."""

OF_SAMPLES = (
    "run.json is of an earlier version: samples of the weights are compared, contents "
    "of files are not. From the next call on all of them are."
)

LOG = logging.getLogger("kvjax.eval")


def describe(cell: Cell, config: EvalConfig) -> dict[str, Any]:
    """The columns that say which cell this is."""
    group = cell.group
    return {
        "cell": cell.name,
        "model": config.model,
        "task": group.title,
        "length": group.length,
        "depth": cell.depth,
        "turn": cell.turn,
        "compression": cell.method.name,
        "overrides": cell.method.overrides_json,
        "keep": cell.keep,
        "visibility": group.visibility,
        "seed": group.seed,
        "source": group.source,
        "batch": group.batch,
    }


def averages(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over items and their standard errors; None where there is nothing."""
    score, score_se = mean(items, "score")
    agreement, agreement_se = mean(items, "agrees")
    return {
        "items": len(items),
        "score": score,
        "score_se": score_se,
        "agreement": agreement,
        "agreement_se": agreement_se,
        "nll": mean(items, "nll")[0],
        "kl": mean(items, "kl")[0],
    }


def mean(
    items: Sequence[Mapping[str, Any]], name: str
) -> tuple[float | None, float | None]:
    """Mean of a column and its standard error, which one item does not have."""
    found = [item[name] for item in items if item.get(name) is not None]
    if not found:
        return None, None
    values = np.array(found, np.float64)
    if len(values) == 1:
        return float(values[0]), None
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def provenance() -> dict[str, Any]:
    """The columns that say what computed a row, and when."""
    return {
        "schema": SCHEMA,
        "versions": json.dumps(versions()),
        "device": jax.devices()[0].device_kind,
        "date": now(),
    }


def header(
    model: Decoder,
    config: EvalConfig,
    inputs: Inputs,
    checkpoint: Mapping[str, str],
    old: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `run.json` says.

    Args:
        model: what is evaluated.
        config: what is run.
        inputs: digests of what it reads.
        checkpoint: sizes and times of the model's files; none where it has none.
        old: `run.json` of an earlier call. If the files are those that it saw, so are
            the weights; else they are all looked at.
    """
    about = {
        "schema": SCHEMA,
        **versions(),
        "device": jax.devices()[0].device_kind,
        "date": now(),
        "model": config.model,
        "dtype": model.dtype.name,
        "model_fingerprint": _fingerprint(model, checkpoint, old or {}),
        "config": dataclasses.asdict(config),
        "inputs": inputs,
        "checkpoint": dict(checkpoint),
    }
    if old and len(str(old.get("model_fingerprint"))) == SAMPLED:
        LOG.warning(OF_SAMPLES)
        about["sampled_fingerprint"] = sampled_fingerprint(model)
    return about


def _fingerprint(
    model: Decoder, checkpoint: Mapping[str, str], old: Mapping[str, Any]
) -> str:
    known = str(old.get("model_fingerprint"))
    shape = origins.fingerprint(model.config)
    same = old.get("dtype") == model.dtype.name and known.startswith(f"{shape}-")
    if same and untouched(old.get("checkpoint", {}), checkpoint):
        return known
    return fingerprint(model)


def fingerprint(model: Decoder) -> str:
    """Digests of a model's configuration, and of all values of all its weights."""
    weights = origins.weights_of(model)
    assert weights is not None  # nothing is evaluated under `jit`
    return f"{origins.fingerprint(model.config)}-{weights.digest}"


def sampled_fingerprint(model: Decoder) -> str:
    """As version 0.1.0 had it: a configuration, and samples of every weight."""
    digest = hashlib.sha256(origins.fingerprint(model.config).encode())
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        flat = leaf.get_value().reshape(-1)
        some = np.asarray(flat[:: max(1, flat.size // 1024)])
        digest.update(f"{path}{flat.shape}{flat.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:SAMPLED]


def versions() -> dict[str, str]:
    """Of this package, of what computes, and of Python."""
    names = ("kvjax", "jax", "flax")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version()}


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
