"""`make kernels`: what of it needs no compiler for another chip."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels import compile as compiling
from kvjax.pallas_kernels.cases import Workload
from kvjax.pallas_kernels.dispatch import Op
from kvjax.pallas_kernels.measured import one_line, read_dump, vmem_bytes
from kvjax.pallas_kernels.targets import TARGETS, chosen
from kvjax.pallas_kernels.traffic import implied_bytes
from tests.tree import ROOT, tool


@pytest.fixture(scope="module", name="tool")
def kernels_tool():
    return tool("kernels")


def row(**fields):
    base = {"op": "fake", "workload": "bf16", "pass_": "forward", "target": "v5e"}
    return {**base, "backend": "tpu", "status": "ok", "reason": "", **fields}


# What an engineer reads.


def test_table_names_what_failed(tool):
    rows = [
        row(compile_s=1.25, onchip_bytes=3 << 20, temp_bytes=0, floor_bytes=100),
        row(pass_="backward", status="failed", reason="E1001: no room"),
    ]
    rows[0] |= {"hbm_bytes": 104, "spec_bytes": None}
    lines = tool.table(rows).splitlines()
    first = "fake bf16 v5e tpu ok 1.2 3.0 MiB 0 B 1.04 -"
    assert lines[1].split() == first.split()
    assert lines[2].split()[:5] == ["fake", "bf16", "backward", "v5e", "tpu"]
    assert lines[-1] == "fake bf16 backward v5e: failed: E1001: no room"
    assert tool.table([]).split()[:2] == ["op", "workload"]


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({}, False),
        ({"status": "failed"}, True),
        ({"status": "refused"}, True),
        ({"status": "not compiled", "family": "cuda"}, False),
        ({"status": "not compiled", "family": "tpu"}, True),
    ],
)
def test_exit_code(tool, fields, bad):
    assert bool(tool.failures([row(**fields)])) == bad


def test_a_declared_refusal_is_no_failure(tool, tmp_path):
    page = "## Refusals\n\n- `gpu`, `int2*`: no packed two-bit loads\n- `tpu`: never\n"
    (tmp_path / "fake.md").write_text(page)
    assert tool.declared(row(backend="gpu", workload="int2_b1"), tmp_path)
    assert not tool.declared(row(backend="gpu", workload="int4_b1"), tmp_path)
    assert tool.declared(row(backend="tpu"), tmp_path)
    assert not tool.declared(row(op="without_a_page"), tmp_path)


# One process per target, whatever the compiler does to it.

CRASHES = """#!{python}
import json, os, signal, sys
first = int(sys.argv[sys.argv.index("--first") + 1])
print("a compiler's own words")
print(json.dumps({{"versions": {{"jax": "0"}}}}))
for number in range(first, 3):
    one = {{"op": "fake", "workload": str(number), "target": "v5e", "status": "ok"}}
    print(json.dumps({{"starts": number, **one}}), flush=True)
    if number == 1:
        print("LLVM ERROR: out of patience", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIG{how})
    print(json.dumps(one), flush=True)
print(json.dumps({{"done": True}}))
"""


def script(tmp_path, text):
    path = tmp_path / "python"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("how", "limit"), [("ABRT", 60), ("STOP", 1)])
def test_a_dead_compiler_costs_one_program(tool, tmp_path, how, limit):
    text = CRASHES.format(python=sys.executable, how=how)
    python = script(tmp_path, text)
    versions, rows = tool.compile_target(python, TARGETS["v5e"], None, limit)
    assert versions == {"jax": "0"}
    assert [r["status"] for r in rows] == ["ok", "failed", "ok"]
    assert "out of patience" in rows[1]["reason"]


def test_an_interpreter_without_kvjax_is_a_failure(tool, tmp_path):
    text = f"#!{sys.executable}\nraise ImportError('no kvjax')\n"
    python = script(tmp_path, text)
    _, rows = tool.compile_target(python, TARGETS["v5e"], "fake")
    assert [r["status"] for r in rows] == ["failed"]
    assert "no kvjax" in rows[0]["reason"]


def test_pins_are_those_of_the_lock(tool):
    lock = (ROOT / "requirements.lock").read_text()
    jax_pin = next(pin for pin in tool.PINS["cuda"] if pin.startswith("jax["))
    assert f"\n{jax_pin.replace('[cuda13]', '')} " in lock


def test_targets():
    assert [t.name for t in chosen(["tpu"])] == ["v5e", "v6e", "v7x"]
    assert [t.name for t in chosen(["h200", "v6e"])] == ["v6e", "h200"]
    with pytest.raises(ValueError, match=r"one of|must be of.*'v9'"):
        chosen(["v9"])


# What is compiled.


@pytest.fixture
def fake(monkeypatch):
    """An op with a TPU kernel and a gradient, in no registry."""

    def call(x, *, table, scale, backend):
        if x.dtype == jnp.float16:
            raise NotImplementedError("fake: no float16")
        if x.dtype == jnp.int8:
            raise NotImplementedError("Only 32-bit types in this lowering")
        return {"out": x * scale, "sum": jnp.sum(table), "of": backend}["out"]

    def load(name, dtype, gradient=()):
        def make():
            x = jax.ShapeDtypeStruct((8, 4), dtype)
            table = jax.ShapeDtypeStruct((3,), jnp.int32)
            return (x,), {"table": table, "scale": 2.0 if dtype != jnp.int8 else 2}

        return Workload(name=name, make=make, floor_bytes=256, gradient=gradient)

    loads = (load("f32", jnp.float32, (0,)), load("f16", jnp.float16))
    loads += (load("int8", jnp.int8),)
    name = "kvjax.pallas_kernels.fake"
    package = types.ModuleType(name)
    cases = types.ModuleType(f"{name}.cases")
    vars(package).update(fake=call)
    vars(cases).update(WORKLOADS=loads)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, f"{name}.cases", cases)
    op = Op(name="fake", backends=("reference", "tpu"))
    monkeypatch.setattr(compiling, "OPS", {"fake": op})


def test_every_workload_is_a_job(fake):
    found = [(r.workload, r.pass_) for r, _ in compiling.jobs(TARGETS["v5e"])]
    assert found[:2] == [("f32", "forward"), ("f32", "backward")]
    assert len(found) == 4
    # Without a kernel for the chip, what the automatic choice takes is compiled.
    assert {r.backend for r, _ in compiling.jobs(TARGETS["h200"])} == {"reference"}


def test_rows_say_what_became_of_programs(fake):
    # The CPU stands for the chip: the path through the compiler is the same.
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:1], ("x",))
    done = [
        compiling.compile_row(r, load, mesh)
        for r, load in compiling.jobs(TARGETS["h200"])
    ]
    assert [r.status for r in done] == ["ok", "ok", "refused", "failed"]
    assert done[0].compile_s is not None and done[0].temp_bytes is not None
    assert [r.floor_bytes for r in done] == [None, 256, 256, 256]
    assert done[2].reason == "fake: no float16"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n one\ntwo"), " one"),
        (KeyError(), "KeyError"),
        (
            RuntimeError(
                "E1001: Oom:\nScoped allocation with size 33.00M and limit 16.00M "
                "exceeded scoped vmem limit by 17.00M. It should"
            ),
            "E1001: Oom: Scoped allocation with size 33.00M and limit 16.00M exceeded "
            "scoped vmem limit by 17.00M",
        ),
    ],
)
def test_errors_in_one_line(error, line):
    assert one_line(error) == line


def test_memory_is_read_from_what_compilers_print(tmp_path):
    def call(size):
        used = json.dumps([{"memory_space": "1", "offset": "0", "size": str(size)}])
        return (
            '%a = f32[8]{0} custom-call(%b), custom_call_target="tpu_custom_call", '
            f'backend_config={{"used_scoped_memory_configs":{used}}}'
        )

    other = call(9 << 20).replace("tpu_custom_call", "Sharding")
    assert vmem_bytes("\n".join([call(1 << 20), other, call(1 << 10)])) == 1 << 20
    assert vmem_bytes("ROOT %add = f32[] add(%a, %b)") is None
    launch = "gpu.launch dynamic_shared_memory_size %c{}_i32 {{"
    (tmp_path / "kern_0.after_layout_inference.txt").write_text(launch.format(65544))
    (tmp_path / "kern_1.after_layout_inference.txt").write_text(launch.format(1024))
    (tmp_path / "kern_0.ptxas").write_text(
        "0 bytes stack frame, 8 bytes spill stores\nptxas info : Used 168 registers"
    )
    assert read_dump(tmp_path) == {
        "onchip_bytes": 65544,
        "registers": 168,
        "spill_bytes": 8,
    }
    assert read_dump(None) == {}


# HBM bytes by block specs.


def copied(index_map, grid=(4, 8), prefetch=0, space=None):
    """Bytes of a kernel whose input blocks of 4 KiB follow an index map."""

    def kernel(*refs):
        refs[-1][...] = jnp.zeros((8, 128), jnp.float32)

    block = pl.BlockSpec((8, 128), index_map)
    out = pl.BlockSpec((8, 128), lambda *_: (0, 0))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=prefetch,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=space) if space else block],
        out_specs=out,
    )
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    call = pl.pallas_call(kernel, grid_spec=spec, out_shape=shape)
    tables = [jax.ShapeDtypeStruct((4,), jnp.int32)] * prefetch
    x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    return implied_bytes(jax.jit(call).trace(*tables, x).jaxpr)


BLOCK = 4096


@pytest.mark.parametrize(
    ("index_map", "blocks"),
    [
        (lambda i, j: (0, 0), 1),
        (lambda i, j: (i, 0), 4),
        (lambda i, j: (j, 0), 32),
        (lambda i, j: (j // 2, 0), 16),
        (lambda i, j: (jnp.minimum(i, j), 0), 9),
    ],
)
def test_bytes_of_block_specs(index_map, blocks):
    assert copied(index_map) == (blocks + 1) * BLOCK


def test_bytes_of_prefetched_tables_are_bounded_from_above():
    table = 16
    by_row = copied(lambda i, j, n: (n[i], 0), prefetch=1)
    assert by_row == (4 + 1) * BLOCK + table
    by_step = copied(lambda i, j, n: (jnp.minimum(j, n[i]), 0), prefetch=1)
    assert by_step == (32 + 1) * BLOCK + table


def test_bytes_of_manual_copies_are_not_known():
    assert copied(None, space=pl.ANY) is None
    assert implied_bytes(jax.jit(jnp.sin).trace(1.0).jaxpr) is None


# With the compiler.


@pytest.mark.slow
def test_compiles_for_an_absent_tpu():
    python = os.environ.get("KVJAX_TPU_PYTHON", str(ROOT / ".venv-tpu/bin/python"))
    if not os.path.exists(python):
        pytest.skip("no libtpu: `make kernels` makes .venv-tpu")
    command = [python, "-m", "kvjax.pallas_kernels.compile", "--json"]
    command += ["--target", "v5e", "--op", "page_summary"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    records = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert "libtpu" in records[0]["versions"], done.stderr
    assert {"done": True} in records
