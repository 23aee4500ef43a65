"""First updates of adapters on several devices: a public report saw the loss stuck by the order of devices alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import itertools, json, sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from small import language_model
from slow_packing import pack
from test_training import pairs
from fastpref.learning import update as updates
from fastpref.method.adapter import AdapterConfig
from fastpref.method.algorithms import ALGORITHMS
from fastpref.models.adapters import adapt
from fastpref.models.scoring import score

model = language_model()
definition, params = nnx.split(model.module)
batch = pack(pairs(count=8), rows=4, length=32, slots=2, layout="shared", prompt_length=0)
batch = batch._replace(ref_logps=np.asarray(score(definition, params, batch)))
optimizer, results = optax.adamw(3e-3), []
for init in ("zero-b", "zero-a"):
    base, start = adapt(model, AdapterConfig(rank=4, init=init), seed=0)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        devices = np.array(jax.devices())[list(order)]
        mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
        split = NamedSharding(mesh, PartitionSpec("data"))
        whole = NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put(batch._replace(ids=batch.ids.astype(np.int32)), split)
        frozen = jax.device_put(base, whole)
        for algorithm in ("online-dpo", "online-ipo"):
            trained = jax.device_put(jax.tree.map(jnp.copy, start), whole)
            state, losses = jax.device_put(optimizer.init(trained), whole), []
            for _ in range(4):
                trained, state, metrics = updates.update(
                    definition, trained, state, placed, np.float32(0.5), optimizer=optimizer,
                    objective=ALGORITHMS[algorithm].objective, base=frozen,
                )
                losses.append(float(metrics["loss"]))
            results.append([init, order, algorithm, losses])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def losses() -> list[Any]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("init", ["zero-b", "zero-a"])
def test_the_loss_leaves_its_start_in_every_order_of_devices(init: str, losses: list[Any]) -> None:
    starts = {"online-dpo": 0.6931, "online-ipo": 1.0}
    runs = [(algorithm, values) for kind, _, algorithm, values in losses if kind == init]
    assert len(runs) == 6
    for algorithm, values in runs:
        assert values[0] == pytest.approx(starts[algorithm], abs=1e-3)
        assert values[3] < values[1] < values[0] - 1e-3, (algorithm, values)
        same = [other for name, other in runs if name == algorithm]
        assert all(other == pytest.approx(same[0], rel=1e-4) for other in same)
