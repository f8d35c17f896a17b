"""What a compiled program needs in memory, as its compiler says."""

from __future__ import annotations

from typing import Any

import jax


def memory_report(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes per device of a compiled program.

    Returns:
      `argument_bytes`, `output_bytes`, `alias_bytes` (outputs that take the place of donated
      arguments), `temp_bytes` (the heap that holds every temporary: its peak, not their sum) and
      `generated_code_bytes`, as the compiler says; `host_argument_bytes`, `host_temp_bytes`:
      arguments and temporaries in the memory of the host, next to which the device lives.
      `peak_bytes`: what a device sets aside for one call, argument + output - alias + temp, as
      `peak_source` tells.
      `compiler_peak_bytes`: the compiler's own peak, 0 where it gives none. It is no bound: the
      CPU compiler leaves the temporaries out, the TPU compiler adds buffers in on-chip memory.

    Raises:
      ValueError: the backend gives no memory analysis.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend's compiler gives no memory analysis")
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "generated_code_bytes": stats.generated_code_size_in_bytes,
        "host_argument_bytes": stats.host_argument_size_in_bytes,
        "host_temp_bytes": stats.host_temp_size_in_bytes,
        "peak_bytes": stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes,
        "peak_source": "argument+output-alias+temp",
        "compiler_peak_bytes": stats.peak_memory_in_bytes,
    }
