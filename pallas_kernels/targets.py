"""The chips that programs are compiled for when none is attached, as data.

Standard library only: `tools/kernels.py` reads this file without importing JAX.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

_QUIET = {
    # A persistent cache would hide compile times and the compilers' own dumps.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One chip, as its compiler knows it.

    Attributes:
        name: for the command line, the table and the tuned block sizes.
        family: which wheels hold the compiler.
        backend: of the ops.
        device_kind: what JAX calls the device.
        topology: arguments of `jax.experimental.topologies.get_topology_desc`.
        environment: to be set before JAX is imported.
        slices: what of `topology` is another for some number of chips.
        hbm_bytes: of one device of the topology.
        usable_bytes: of it that the compiler gives to a program, in its own words where
            one does not fit; all of it where it does not say.
        hbm_bandwidth: bytes per second of one device of the topology.
        bf16_flops: of one device of the topology, per second, without sparsity.
        onchip: what a kernel's blocks live in.
        onchip_bytes: of it, for one TensorCore or one thread block.
        source: of these numbers.
        kernels: whether `make kernels` compiles for it.
    """

    name: str
    family: Literal["tpu", "cuda"]
    backend: Literal["tpu", "gpu"]
    device_kind: str
    topology: Mapping[str, Any]
    environment: Mapping[str, str]
    slices: Mapping[int, Mapping[str, str]]
    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth: int
    bf16_flops: int
    onchip: Literal["VMEM", "SMEM"]
    onchip_bytes: int
    source: str
    kernels: bool = True

    def of(self, chips: int) -> Mapping[str, Any]:
        """`topology` for some chips.

        Raises:
            ValueError: the chip comes in no such slice.
        """
        if chips not in self.slices:
            raise ValueError(
                f"{self.name} is known in slices of {[*self.slices]} chips; got "
                f"{chips}. Take one of them."
            )
        return {**self.topology, **self.slices[chips]}


_GIB = 1 << 30
_FLAT = MappingProxyType(
    {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
)
_BOARD = (1, 2, 4, 8)  # GPUs of one host
_CUBE = MappingProxyType(
    {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
)


def _tpu(
    name: str,
    kind: str,
    topology: str,
    slice_: str,
    shapes: Mapping[int, str],
    **known: Any,
) -> Target:
    prefix = topology.partition(":")[0]
    return Target(
        name=name,
        family="tpu",
        backend="tpu",
        device_kind=kind,
        topology=MappingProxyType({"platform": "tpu", "topology_name": topology}),
        environment=MappingProxyType(
            {
                **_QUIET,
                # No metadata server answers here; the other two silence warnings.
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_ACCELERATOR_TYPE": slice_,
                "TPU_WORKER_HOSTNAMES": "localhost",
                # Its lock file guards chips; here several processes only compile.
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            }
        ),
        slices=MappingProxyType(
            {n: {"topology_name": f"{prefix}:{s}"} for n, s in shapes.items()}
        ),
        onchip="VMEM",
        source="jax 0.11.2, `jax._src.tpu_info`; on-chip memory is of one TensorCore; "
        "usable bytes: what libtpu 0.0.51 said of a program of 400 GiB (of v5p, which "
        "was not asked, all)",
        **known,
    )


# The compiler's description of an H200, in the text form of its protocol buffer.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 141000000000  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

# The same die (132 multiprocessors, 50 MiB of cache) with other memory: SXM5, HBM3.
_H100 = (
    _H200.replace("4800000000000", "3350000000000")
    .replace("141000000000", "80000000000")
    .replace("NVIDIA H200", "NVIDIA H100 80GB HBM3")
)


def _gpu(
    name: str,
    description: str,
    kind: str,
    *,
    hbm_bytes: int,
    hbm_bandwidth: int,
    kernels: bool = True,
) -> Target:
    topology = {"platform": "cuda", "topology_name": name, "topology": "1x1x1"}
    return Target(
        name=name,
        family="cuda",
        backend="gpu",
        device_kind=kind,
        topology=MappingProxyType({**topology, "target_config": description}),
        environment=MappingProxyType(_QUIET),
        slices=MappingProxyType({n: {"topology": f"1x1x{n}"} for n in _BOARD}),
        hbm_bytes=hbm_bytes,
        usable_bytes=hbm_bytes,
        hbm_bandwidth=hbm_bandwidth,
        bf16_flops=989_000_000_000_000,
        onchip="SMEM",
        onchip_bytes=232_448,
        source="NVIDIA's data sheets of H100 SXM and H200 SXM (dense bfloat16); CUDA's "
        "limit of shared memory per block",
        kernels=kernels,
    )


_ALL = (
    _tpu(
        "v5e",
        "TPU v5 lite",
        "v5e:2x2",
        "v5litepod-4",
        _FLAT,
        hbm_bytes=16 << 30,
        usable_bytes=1575 * _GIB // 100,
        hbm_bandwidth=820_000_000_000,
        bf16_flops=197_000_000_000_000,
        onchip_bytes=128 << 20,
    ),
    _tpu(
        "v6e",
        "TPU v6 lite",
        "v6e:2x2",
        "v6e-4",
        _FLAT,
        hbm_bytes=32 << 30,
        usable_bytes=3124 * _GIB // 100,
        hbm_bandwidth=1_640_000_000_000,
        bf16_flops=920_000_000_000_000,
        onchip_bytes=128 << 20,
    ),
    _tpu(
        "v7x",
        "TPU7x",
        "tpu7x:2x2x1",
        "tpu7x-8",
        _CUBE,
        hbm_bytes=96 << 30,
        usable_bytes=9474 * _GIB // 100,
        hbm_bandwidth=3_700_000_000_000,
        bf16_flops=1_155_000_000_000_000,
        onchip_bytes=64 << 20,
    ),
    _tpu(
        "v5p",
        "TPU v5",
        "v5p:2x2x1",
        "v5p-8",
        _CUBE,
        hbm_bytes=95 << 30,
        usable_bytes=95 << 30,
        hbm_bandwidth=2_460_000_000_000,
        bf16_flops=459_000_000_000_000,
        onchip_bytes=64 << 20,
        kernels=False,
    ),
    _gpu(
        "h200",
        _H200,
        "NVIDIA H200",
        hbm_bytes=141_000_000_000,
        hbm_bandwidth=4_800_000_000_000,
    ),
    _gpu(
        "h100",
        _H100,
        "NVIDIA H100 80GB HBM3",
        hbm_bytes=80_000_000_000,
        hbm_bandwidth=3_350_000_000_000,
        kernels=False,
    ),
)

TARGETS: Mapping[str, Target] = MappingProxyType({one.name: one for one in _ALL})
FAMILIES = ("tpu", "cuda")


def chosen(words: Sequence[str]) -> list[Target]:
    """Targets of a command line: names of chips, or of families for all of theirs.

    Raises:
        ValueError: a word that is neither.
    """
    known = [*FAMILIES, *(t.name for t in _ALL if t.kernels)]
    for word in words:
        if word not in known:
            raise ValueError(f"`targets` must be of {known}; got {word!r}.")
    named = [t for t in _ALL if t.name in words or t.family in words]
    return [t for t in named if t.kernels]
