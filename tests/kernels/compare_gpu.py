"""Results of the GPU kernels without a GPU: the PTX that XLA makes of them, interpreted, against loops in float64.

It takes minutes, and the packages that ``gpu_compile.py`` names.

    python benchmarks/gpu_emulate.py [--gpu "NVIDIA H200"]
"""

import argparse

import gpu_compile  # before JAX
import gpu_scan
import jax
import jax.numpy as jnp
import numpy as np
import ptx

from pallas_kernels.gpu import backend, launch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="NVIDIA H200", choices=gpu_compile.GPUS, help="to compile for (default H200)")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    def call(kernel, programs, inputs, outputs, **rest):
        """Do what ``backend.call`` does."""

        def again(*arrays):
            specified = [(array, spec) for array, (_, spec) in zip(arrays, inputs, strict=True)]
            return backend.call(kernel, programs, specified, outputs, **rest)

        arrays = [np.asarray(array) for array, _ in inputs]
        program = ptx.Program(gpu_compile.ptx(again, options.gpu, arrays))
        results = program.run(arrays, [(s.shape, s.dtype) for s, _ in outputs], rest["aliases"], programs)
        return list(map(jnp.asarray, results))

    launch.call = call
    gpu_scan.compiled = lambda programs: [function for function, _ in programs]
    gpu_scan.check(interpret=False)


if __name__ == "__main__":
    main()
