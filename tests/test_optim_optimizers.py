"""Optimizers against their papers' equations in NumPy float64, and by their properties."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.config import ConfigError, OptimizerConfig, ScheduleConfig
from spmd_train.optim import ema_update, make_optimizer

NAMES = ("adamw", "lion", "adafactor", "sgd", "muon")
CONSTANT = ScheduleConfig(name="constant")

AXES = {
    "blocks": {
        "attention": {
            "query": {
                "kernel": ("layers", "embed", "heads", "head_dim"),
                "bias": ("layers", "heads", "head_dim"),
            },
            "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
        },
        "mlp": {"up": {"kernel": ("layers", "embed", "mlp")}},
        "norm": {"scale": ("layers", "norm")},
    },
    "embedding": {"table": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab")},
}
SIZES = {
    "layers": 2, "embed": 16, "heads": 4, "head_dim": 8, "mlp": 24, "norm": 16, "vocab": 40,
}  # fmt: skip
MATRICES = ("attention/query/kernel", "attention/out/kernel", "mlp/up/kernel")


def is_axes(node) -> bool:
    return isinstance(node, tuple)


def random_tree(seed: int, dtype: str = "float32"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda axes: jnp.asarray(rng.normal(size=[SIZES[a] for a in axes]), dtype),
        AXES,
        is_leaf=is_axes,
    )


def leaves(tree, is_leaf=None) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in flat}


def build(params=None, axes=None, **config) -> optax.GradientTransformation:
    config = {"schedule": CONSTANT, "clip_norm": 0.0, "weight_decay": 0.0} | config
    return make_optimizer(
        OptimizerConfig(**config),
        num_steps=100,
        params=random_tree(0) if params is None else params,
        logical_axes=leaves(AXES, is_leaf=is_axes) if axes is None else axes,
    )


def run(optimizer, params, gradients):
    @jax.jit
    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params, state


def run_matrix(gradients, start, **config) -> np.ndarray:
    """Trains one matrix "w" that belongs to no layer."""
    optimizer = build({"w": start}, {"w": ("embed", "mlp")}, **config)
    params, _ = run(
        optimizer, {"w": jnp.asarray(start)}, [{"w": jnp.asarray(g)} for g in gradients]
    )
    return np.asarray(params["w"])


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(1)
    return rng.normal(size=(5, 3)).astype("float32"), rng.normal(size=(4, 5, 3)).astype("float32")


def test_optim_adamw_follows_the_paper(small):
    start, gradients = small
    w, m, v = start.astype("float64"), 0.0, 0.0
    for t, g in enumerate(gradients.astype("float64"), 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.01 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.3 * w)
    config = {"learning_rate": 0.01, "b1": 0.8, "b2": 0.9, "epsilon": 1e-3, "weight_decay": 0.3}
    np.testing.assert_allclose(
        run_matrix(gradients, start, name="adamw", **config), w, rtol=1e-5, atol=1e-6
    )


def test_optim_bfloat16_moments_are_rounded_only_between_steps(small):
    start, gradients = small
    rounded = jnp.bfloat16
    w, m, v = start, np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(gradients, 1):
        m, v = (
            np.float32(0.8) * m + np.float32(0.2) * g,
            np.float32(0.9) * v + np.float32(0.1) * g**2,
        )
        w = w - 0.5 * (m / (1 - 0.8**t) / np.sqrt(v / (1 - 0.9**t)))
        m, v = m.astype(rounded).astype("float32"), v.astype(rounded).astype("float32")
    config = {"learning_rate": 0.5, "b1": 0.8, "b2": 0.9, "state_dtype": "bfloat16"}
    got = run_matrix(gradients, start, name="adamw", **config)
    np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-4)
    assert (
        np.abs(
            got - run_matrix(gradients, start, name="adamw", **config | {"state_dtype": "float32"})
        ).max()
        > 1e-3
    )


def test_optim_lion_follows_the_paper(small):
    start, gradients = small
    w, m = start.astype("float64"), np.zeros_like(start, "float64")
    for g in gradients.astype("float64"):
        w = w - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.3 * w)
        m = 0.99 * m + 0.01 * g
    got = run_matrix(
        gradients, start, name="lion", learning_rate=0.01, b1=0.9, b2=0.99, weight_decay=0.3
    )
    np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_optim_sgd_is_heavy_ball_with_decoupled_decay(small, b1):
    start, gradients = small
    w, m = start.astype("float64"), 0.0
    for g in gradients.astype("float64"):
        m = b1 * m + g
        w = w - 0.01 * (m + 0.3 * w)
    got = run_matrix(gradients, start, name="sgd", learning_rate=0.01, b1=b1, weight_decay=0.3)
    np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-6)


def test_optim_adafactor_is_optax_adafactor_without_parameter_scale():
    rng = np.random.default_rng(2)
    start = rng.normal(size=(130, 140)).astype("float32")
    gradients = rng.normal(size=(3, 130, 140)).astype("float32")
    reference = optax.adafactor(0.01, multiply_by_parameter_scale=False, momentum=0.9)
    params, state = start, reference.init(start)
    for g in gradients:
        updates, state = reference.update(g, state, params)
        params = optax.apply_updates(params, updates)
    config = {"name": "adafactor", "learning_rate": 0.01, "b1": 0.9, "epsilon": 0.0}
    got = run_matrix(gradients, start, b2=0.9999, **config)
    np.testing.assert_allclose(got, params, rtol=1e-5, atol=1e-6)
    # b2 caps the second moment's decay: from step 2 on 1 - t**-0.8 is above 0.4.
    assert not np.allclose(run_matrix(gradients, start, b2=0.4, **config), params, atol=1e-4)


def test_optim_adafactor_state_is_factored_and_layers_are_apart():
    rng = np.random.default_rng(3)
    stacked = {"w": jnp.asarray(rng.normal(size=(2, 130, 140)), "float32")}
    # The second layer's gradient jumps: its update is clipped, the first layer's must not be.
    gradients = [
        {"w": jnp.asarray(rng.normal(size=(2, 130, 140)) * [[[1.0]], [[jump]]], "float32")}
        for jump in (0.01, 100.0)
    ]
    axes = {"w": ("layers", "embed", "mlp")}
    params, state = run(build(stacked, axes, name="adafactor"), stacked, gradients)
    shapes = {path: leaf.shape for path, leaf in leaves(state).items()}
    assert shapes["precondition/0/v_row/w"] == (2, 130)
    assert shapes["precondition/0/v_col/w"] == (2, 140)
    for layer in range(2):
        alone = run_matrix(
            [g["w"][layer] for g in gradients], stacked["w"][layer], name="adafactor"
        )
        np.testing.assert_allclose(params["w"][layer], alone, rtol=1e-5, atol=1e-6)


def matrix_of(path: str, layer: jax.Array) -> jax.Array:
    """A layer's kernel as its [rows, columns] matrix."""
    return layer.reshape(-1, SIZES["embed"]) if "out" in path else layer.reshape(16, -1)


def test_optim_muon_on_stacked_layers_is_muon_on_each_layer():
    gradients = [random_tree(seed) for seed in (1, 2, 3)]
    config = {"name": "muon", "learning_rate": 0.02, "b1": 0.95, "weight_decay": 0.1}
    params, _ = run(build(**config), random_tree(0), gradients)

    def split(tree):  # every layer's matrix a leaf of its own
        return {
            f"{path}/{layer}": matrix_of(path, leaves(tree)["blocks/" + path][layer])
            for path in MATRICES
            for layer in range(SIZES["layers"])
        }

    reference = optax.contrib.muon(0.02, beta=0.95, weight_decay=0.1, consistent_rms=0.2)
    alone, _ = run(reference, split(random_tree(0)), [split(g) for g in gradients])
    for name, matrix in split(params).items():
        np.testing.assert_allclose(matrix, alone[name], atol=2e-5)


def test_optim_muon_leaves_vectors_and_tables_to_adamw():
    gradients = [random_tree(seed) for seed in (1, 2)]
    config = {"learning_rate": 0.02, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
    muon = leaves(run(build(name="muon", **config), random_tree(0), gradients)[0])
    adamw = leaves(run(build(name="adamw", **config), random_tree(0), gradients)[0])
    for path, leaf in muon.items():
        same = np.allclose(leaf, adamw[path], rtol=1e-5, atol=1e-6)
        assert same != path.endswith(MATRICES), path


def test_optim_muon_updates_are_orthogonal_and_of_adams_size():
    optimizer, params, gradient = (
        build(name="muon", learning_rate=1.0),
        random_tree(0),
        random_tree(1),
    )
    # One layer's gradient is huge: its matrix is orthogonalized alone, so nothing else may change.
    loud = jax.tree.map(lambda g: g.at[0].multiply(1e4), gradient["blocks"])
    update, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(params)
    updates, _ = update(gradient, state, params)
    louder, _ = update(gradient | {"blocks": loud}, state, params)
    for path in MATRICES:
        name = "blocks/" + path
        np.testing.assert_allclose(leaves(updates)[name], leaves(louder)[name], atol=1e-4)
        for layer in range(SIZES["layers"]):
            matrix = np.asarray(matrix_of(path, leaves(updates)[name][layer]))
            gradient_matrix = np.asarray(matrix_of(path, leaves(gradient)[name][layer]))
            before = np.linalg.svd(gradient_matrix, compute_uv=False)
            after = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert before.max() / before.min() > 3
            assert 0.6 < after.min() < after.max() < 1.25
            assert 0.16 < np.sqrt(np.mean(matrix**2)) < 0.22
            # Descent: it points along the gradient, up to the sign.
            assert np.sum(matrix * gradient_matrix) < 0


def test_optim_muon_without_matrices_is_told():
    with pytest.raises(ConfigError, match="muon"):
        build({"w": np.ones((4, 4))}, {"w": ("embed", "mlp")}, name="muon")


@pytest.mark.parametrize("name", NAMES)
def test_optim_decay_mask_skips_what_it_excludes(name):
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = {"name": name, "learning_rate": 0.1, "weight_decay": 0.5}
    got, _ = run(build(weight_decay_exclude="norm|bias|embedding", **config), params, [zeros])
    for path, leaf in leaves(params).items():
        kept = any(word in path for word in ("norm", "bias", "embedding"))
        np.testing.assert_allclose(leaves(got)[path], leaf * (1.0 if kept else 0.95), rtol=1e-6)


def test_optim_decay_follows_the_schedule():
    schedule = ScheduleConfig(name="linear", end_factor=0.0)
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=0.1, weight_decay=0.5, weight_decay_exclude="", schedule=schedule
        ),
        num_steps=2,
        params=params,
        logical_axes=leaves(AXES, is_leaf=is_axes),
    )
    got, _ = run(optimizer, params, [zeros] * 3)  # rates 0.1, 0.05, 0
    for path, leaf in leaves(params).items():  # an empty pattern excludes nothing
        np.testing.assert_allclose(leaves(got)[path], leaf * 0.95 * 0.975, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "cure"),
    [
        ({"name": "adafactor"}, "set it to none, or optimizer.name to adamw"),
        ({"name": "sgd", "b1": 0.0}, "no moments; set it to none"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_optim_offload_without_moments_to_offload_is_told(config, cure):
    with pytest.raises(ConfigError, match=rf"optimizer\.offload = 'host': .*{cure}"):
        build(**config, offload="host")


def test_optim_bad_exclude_pattern_is_told():
    with pytest.raises(ConfigError, match="weight_decay_exclude"):
        build(weight_decay_exclude="(")


def test_optim_clip_scales_the_whole_gradient_to_the_norm():
    params, gradient = random_tree(0), random_tree(1)
    norm = float(optax.tree.norm(gradient))
    assert norm > 10
    config = {"name": "sgd", "learning_rate": 1.0, "b1": 0.0}

    def step(**clip):
        optimizer = build(**config, **clip)
        return leaves(jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0])

    clipped, loose, off = step(clip_norm=2.0), step(clip_norm=2 * norm), step(clip_norm=0.0)
    assert float(optax.tree.norm(clipped)) == pytest.approx(2.0, rel=1e-5)
    for path, leaf in leaves(gradient).items():
        np.testing.assert_allclose(clipped[path], -leaf * 2.0 / norm, rtol=1e-5)
        np.testing.assert_array_equal(loose[path], -leaf)
        np.testing.assert_array_equal(off[path], -leaf)


def test_optim_state_has_the_same_structure_with_and_without_clipping():
    params = random_tree(0)
    structures = {
        jax.tree.structure(jax.eval_shape(build(clip_norm=norm, weight_decay=wd).init, params))
        for norm in (0.0, 1.0)
        for wd in (0.0, 0.1)
    }
    assert len(structures) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_optim_moments_have_the_state_dtype(name, dtype, param_dtype):
    params = random_tree(0, param_dtype)
    optimizer = build(params, name=name, state_dtype=dtype)
    states = [jax.eval_shape(optimizer.init, params)]
    updates, state = jax.eval_shape(optimizer.update, params, states[0], params)
    states.append(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    for path, leaf in leaves(states[0]).items():
        assert leaf.dtype == leaves(states[1])[path].dtype
        if path.endswith("count"):
            assert leaf.dtype == jnp.int32
        elif path.endswith("ns_coeffs"):  # Newton-Schulz coefficients are no moments
            assert leaf.dtype == jnp.float32
        else:
            assert leaf.dtype == dtype, path


@pytest.mark.parametrize("name", NAMES)
def test_optim_state_leaves_carry_their_parameters_path(name):
    params = leaves(random_tree(0))
    state = leaves(jax.eval_shape(build(name=name).init, random_tree(0)))
    mirrored = set()
    for path, leaf in state.items():
        owner = next((p for p in params if path.endswith("/" + p)), None)
        if owner is None:
            assert path.endswith(("count", "ns_coeffs"))
        elif leaf.shape != (1,):  # Adafactor's placeholder for what a leaf does not have
            assert leaf.shape == params[owner].shape
            mirrored.add(owner)
    assert mirrored == set(params)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optim_training_descends(name, dtype):
    params, target = random_tree(0), random_tree(1)

    def loss(tree):
        errors = jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), tree, target)
        return jnp.mean(jnp.stack(jax.tree.leaves(errors)))

    rate = {"sgd": 10.0}.get(name, 0.03)
    optimizer = build(
        name=name, state_dtype=dtype, learning_rate=rate, schedule=ScheduleConfig(name="cosine")
    )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, first = jax.jit(optimizer.init)(params), float(loss(params))
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.5 * first


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_optim_bfloat16_moments_that_could_not_decay_are_told(name):
    with pytest.raises(ConfigError, match=r"optimizer\.b2 = 0\.999"):
        build(name=name, state_dtype="bfloat16", b2=0.999)
    build(name=name, state_dtype="float32", b2=0.999)
    with pytest.raises(ConfigError, match="float16"):
        build(name=name, state_dtype="float16")


def test_optim_bfloat16_moments_decay_at_the_slowest_rate_allowed():
    start = np.linspace(1.0, 2.0, 128, dtype="float32")[None]
    optimizer = build(
        {"w": start}, {"w": ("embed", "mlp")}, name="lion", state_dtype="bfloat16", b2=1 - 2**-8
    )
    _, state = optimizer.update({"w": start * 256}, optimizer.init({"w": start}), {"w": start})
    before = np.asarray(state["precondition"].mu["w"], "float32")
    _, state = optimizer.update({"w": start * 0}, state, {"w": start})
    assert (np.asarray(state["precondition"].mu["w"], "float32") < before).all()


@pytest.mark.parametrize("name", NAMES)
def test_optim_sharded_update_is_the_update_of_one_device(name):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, P(*(rules.get(a) for a in axes))), AXES, is_leaf=is_axes
    )
    optimizer = build(name=name, clip_norm=1.0, weight_decay=0.1, learning_rate=0.1)
    gradients = [random_tree(1), random_tree(2)]
    alone, _ = run(optimizer, random_tree(0), gradients)
    placed = jax.device_put([random_tree(0), *gradients], [shardings] * 3)
    params, _ = run(optimizer, placed[0], placed[1:])
    kernel = params["blocks"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    for path, leaf in leaves(alone).items():
        np.testing.assert_allclose(leaves(params)[path], leaf, rtol=1e-4, atol=2e-5)


def test_optim_ema_warms_up_and_then_decays():
    ema = {"w": jnp.zeros(3)}
    expected = np.zeros(3)
    rng = np.random.default_rng(0)
    for step in range(30):
        params = rng.normal(size=3).astype("float32")
        ema = jax.jit(ema_update, static_argnames="decay")(
            ema, {"w": jnp.asarray(params)}, decay=0.5, step=step
        )
        decay = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17][step:][:1] or [0.5]
        expected = decay[0] * expected + (1 - decay[0]) * params
        np.testing.assert_allclose(ema["w"], expected, rtol=1e-5, atol=1e-6)


def test_optim_ema_keeps_its_own_dtype():
    ema = ema_update({"w": jnp.zeros(2)}, {"w": jnp.ones(2, "bfloat16")}, decay=0.999, step=0)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], 0.9, rtol=1e-6)
