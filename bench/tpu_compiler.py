"""The TPU's compiler, `libtpu`, where no TPU is: where it lies, and what it must be told."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import jax

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare(**further: str) -> None:
    """Let this process find the compiler and run everything else on the CPU.

    Args:
      further: more of its environment.

    Raises:
      SystemExit: it is not installed.
    """
    sys.path.append(str(Path(sys.prefix) / "libtpu"))
    if find_spec("libtpu") is None:
        raise SystemExit("libtpu, the TPU's compiler, is missing: `make test` installs it, or install it with pip")
    os.environ |= ENVIRONMENT | further
    jax.config.update("jax_platforms", "cpu")
