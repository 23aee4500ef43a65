"""Adapters of a model: where they are placed, their initial values, and the base that they are trained on.

The parameters of a run with adapters are a mapping from names of modules, in Hugging Face's layout, to `LowRank`
factors; the base stays as it is and is shared by all models that have adapters on it.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fastpref.method.adapter import ALL_LINEAR, AdapterConfig
from fastpref.method.errors import ConfigError, ModelError, ModelWarning
from fastpref.models.configs import text_config, write_config
from fastpref.models.decoder import Decoder
from fastpref.models.huggingface import LanguageModel
from fastpref.models.lowrank import Adapted, LowRank, Quantized, dense, is_quantized
from fastpref.models.stored import KEPT_AS_IS, stored_tensors
from fastpref.models.t5 import T5

HEAD = "lm_head"
"""The name of the head, and of its parameter."""

KINDS = (Adapted, Quantized)
"""Kernels that are no arrays."""

Adapters = dict[str, Any]
"""`LowRank` factors by the name of the module that they are added to, with {} for the number of a layer: those of the
layers lie one after the other, as `Site.layers` says. Arrays of what is trained whole by their path."""


class Place(NamedTuple):
    """A kernel of a module, and the columns of the adapter's B that belong to it."""

    path: tuple[Any, ...]
    start: int
    end: int


class Linear(NamedTuple):
    """A module that may have an adapter. Several kernels may lie in it, side by side, as q, k and v of Phi-3 do."""

    pattern: str
    """Its name, with {} for the number of its layer."""
    layer: int | None
    """None of a module that is outside of the layers."""
    places: tuple[Place, ...]


class Site(NamedTuple):
    """A module with an adapter, or those of one kind in several layers."""

    name: str
    """With {} for the number of a layer."""
    places: tuple[Place, ...]
    layers: tuple[int, ...]
    """Those that have an adapter; empty of a module that is outside of the layers."""
    scales: tuple[float, ...]
    """s of each layer, or of the one module."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(map(self.name.format, self.layers)) if self.layers else (self.name,)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen model with the sites of adapters: makes the parameters of a model from its adapters.

    A pytree whose only child is `params`.
    """

    params: Any
    """Of the model, without adapters."""
    sites: tuple[Site, ...]
    dropout: float = 0.0
    whole: tuple[tuple[Any, ...], ...] = ()
    """Paths of parameters that are trained as they are, beside the adapters."""

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Any, ...]]:
        """The parameters, and what is static."""
        return (self.params,), (self.sites, self.dropout, self.whole)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any]) -> "Base":
        """Rebuild without validation."""
        base = object.__new__(cls)
        for name, value in zip(("params", "sites", "dropout", "whole"), (*children, *static), strict=True):
            object.__setattr__(base, name, value)
        return base

    @property
    def frozen_head(self) -> bool:
        """Whether no gradient goes to the head."""
        return all(site.name != HEAD for site in self.sites)

    def adapted(self, *models: Adapters | None, key: Array | None = None) -> Any:
        """The parameters of models with adapters on this base, whose arrays are shared; of several for one pass.

        Args:
          models: the adapters of each, of every site; None for the base itself.
          key: of the dropout of the first, while it is learned; None for none.
        """
        flat = dict(nnx.to_flat_state(self.params))
        for number, site in enumerate(self.sites):
            noise = None if key is None or not self.dropout else jax.random.fold_in(key, number)
            for place in site.places:
                weight = flat[place.path][...]
                parts = tuple(None if each is None else _part(each[site.name], place) for each in models)
                count = weight.shape[0] if site.layers else 0
                parts = tuple(None if part is None else _in_all(part, site.layers, count) for part in parts)
                scale = scale_in_all(site, count)
                factors = None if isinstance(scale, float) else jnp.asarray(scale, jnp.float32)
                keys = noise if noise is None or not count else jax.random.split(noise, count)
                kernel = Adapted(weight, parts, scale, factors, keys, self.dropout)
                flat[place.path] = flat[place.path].replace(kernel)
        for path in self.whole:
            (adapters,) = models
            flat[path] = flat[path].replace(cast(Adapters, adapters)[_joined(path)])
        return nnx.from_flat_state(flat.items())

    def within(self, module: nnx.Module, attribute: str, adapters: Adapters) -> tuple["Base", Adapters]:
        """The base of a module that holds the model as an attribute and trains its own parameters whole."""
        params = nnx.state(module)
        own = {path: variable[...] for path, variable in nnx.to_flat_state(params) if path[0] != attribute}
        inner = {path[1:]: variable for path, variable in nnx.to_flat_state(params) if path[0] == attribute}
        inner |= dict(nnx.to_flat_state(self.params))
        flat = {(attribute, *path): variable for path, variable in inner.items()}
        flat |= {path: variable for path, variable in nnx.to_flat_state(params) if path in own}
        sites = tuple(
            site._replace(places=tuple(place._replace(path=(attribute, *place.path)) for place in site.places))
            for site in self.sites
        )
        base = replace(self, params=nnx.from_flat_state(flat.items()), sites=sites, whole=tuple(own))
        return base, adapters | {_joined(path): array for path, array in own.items()}


def trainable(model: LanguageModel, config: AdapterConfig | None, *, seed: int) -> tuple[Base, Adapters] | None:
    """The base and the initial adapters that a training with this setting starts from; None to train all parameters.

    Args:
      model: the model as it is given, with adapters or without.
      config: the setting.
      seed: of the initial values.

    Raises:
      ConfigError: the setting names no module, the model has adapters of another shape, or it is in int8 and no
        adapter is to be trained.
      ModelError: the module is not of this package.
    """
    present = split(model)
    if present is None and config is None and is_quantized(nnx.state(model.module)):
        raise without_adapter()
    if present is None:
        return None if config is None else adapt(model, config, seed=seed)
    base, adapters = present
    if config is None:
        return base, adapters
    wanted = dict.fromkeys(targeted(linear_modules(model), config.targets), config.rank)
    received = {name: adapters[site.name].a.shape[-1] for site in base.sites for name in site.modules}
    scales = {scale for site in base.sites for scale in site.scales}
    if wanted != received or scales != {config.scale}:
        raise ConfigError(
            "adapter must be left out, or be as that of the policy, which goes on with its own (rank "
            f"{', '.join(map(str, sorted(set(received.values()))))}, scale {', '.join(map(str, sorted(scales)))}, "
            f"{len(received)} modules), but received {config}. Leave it out, or merge the policy first: "
            "fastpref.models.merged(policy)."
        )
    return replace(base, dropout=config.dropout), adapters


def without_adapter() -> ConfigError:
    """The refusal to train all parameters of a model in int8."""
    return ConfigError(
        "adapter must be set to train a model in int8, whose own parameters have no gradient, but received None. "
        "Set adapter = { rank = 16 }, say, or train a model in floating point: leave base_dtype out."
    )


def adapt(model: LanguageModel, config: AdapterConfig, *, seed: int) -> tuple[Base, Adapters]:
    """The model as a base, and initial adapters, with which it computes what it did.

    Raises:
      ConfigError: a target names no module.
      ModelError: the module is not of this package.
    """
    modules = linear_modules(model)
    chosen = targeted(modules, config.targets)
    zeros_b = config.init == "zero-b"
    sites, adapters = [], {}
    for site in sites_of(modules, dict.fromkeys(chosen, config.scale)):
        inner, outer = sides(model, site.places)
        drawn = (inner, config.rank) if zeros_b else (config.rank, outer)
        bound = (inner if zeros_b else config.rank) ** -0.5
        keys = [jax.random.fold_in(jax.random.key(seed), chosen.index(name)) for name in site.modules]
        each = [jax.random.uniform(key, drawn, jnp.float32, -bound, bound) for key in keys]
        random = jnp.stack(each) if site.layers else each[0]
        shape = (config.rank, outer) if zeros_b else (inner, config.rank)
        zeros = jnp.zeros((*random.shape[:-2], *shape), jnp.float32)
        adapters[site.name] = LowRank(random, zeros) if zeros_b else LowRank(zeros, random)
        sites.append(site)
    return Base(nnx.state(model.module), tuple(sites), config.dropout), adapters


def adapted_shapes(model: LanguageModel, config: AdapterConfig) -> tuple[Base, Adapters]:
    """What `adapt` returns of a model of shapes, with shapes in the place of arrays. Raises what that does."""
    bases: list[Base] = []

    def initial() -> Adapters:
        base, adapters = adapt(model, config, seed=0)
        bases.append(base)
        return adapters

    adapters = jax.eval_shape(initial)
    return bases[0], adapters


def sites_of(modules: Mapping[str, Linear], scales: Mapping[str, float]) -> list[Site]:
    """The sites of the modules that have a scale, those of one kind in one."""
    kinds: dict[str, list[str]] = {}
    for name in scales:
        kinds.setdefault(modules[name].pattern, []).append(name)
    sites = []
    for pattern, names in kinds.items():
        layers = tuple(layer for name in names if (layer := modules[name].layer) is not None)
        sites.append(Site(pattern, modules[names[0]].places, layers, tuple(scales[name] for name in names)))
    return sites


def sides(model: LanguageModel, places: Sequence[Place]) -> tuple[int, int]:
    """I and O of the module that kernels lie in."""
    shapes = {path: tuple(variable.shape) for path, variable in nnx.to_flat_state(nnx.state(model.module))}
    return shapes[places[0].path][-2], places[-1].end


def linear_modules(model: LanguageModel) -> dict[str, Linear]:
    """Modules with kernels by their name in Hugging Face's layout, in the order of the layout.

    Raises:
      ModelError: the module is not of this package.
    """
    module: Any = model.module
    if not isinstance(module, T5 | Decoder):
        raise ModelError(
            f"a model with adapters must be a T5 or a Decoder, but received a {type(module).__name__}. "
            "Leave adapter out, or load the model with fastpref.models.load."
        )
    raw = text_config(model.config) or write_config(module.config, eos_id=0, pad_id=0)
    modules = {}
    for name, stored in stored_tensors(module.config, raw, nnx.state(module)).items():
        if any(len(leaf.shape) != 2 or leaf.path[-1] in KEPT_AS_IS for leaf in stored.leaves):
            continue
        places, end = [], 0
        for leaf in stored.leaves:
            places.append(Place(leaf.path, end, end + leaf.shape[1]))
            end += leaf.shape[1]
        layer = stored.leaves[0].layer
        linear = Linear(stored.pattern.removesuffix(".weight"), layer, tuple(places))
        modules[name.removesuffix(".weight")] = linear
    return modules


def targeted(modules: Mapping[str, object], targets: str | Sequence[str]) -> list[str]:
    """Names of the modules that the targets name, in their order.

    As PEFT reads them: one text is "all-linear" (all but the head) or a regular expression of whole names; names of a
    list are those of modules, or their ends behind a point.

    Raises:
      ConfigError: a target names none.
    """
    ends = sorted({name.rpartition(".")[2] for name in modules})
    if isinstance(targets, str):
        matched = [name for name in modules if (name != HEAD if targets == ALL_LINEAR else re.fullmatch(targets, name))]
        unmatched = [] if matched else [targets]
    else:
        matched = [name for name in modules if any(_ends_with(name, target) for target in targets)]
        unmatched = [target for target in targets if not any(_ends_with(name, target) for name in modules)]
    if unmatched:
        tied = HEAD in unmatched
        remedy = " The head of this model is its embedding, which has no adapter." if tied else ""
        raise ConfigError(
            f"targets of an adapter must name modules of the model, which end with {', '.join(ends)}, but received "
            f"{unmatched[0]!r}, which names none.{remedy} Choose among them, or leave targets out."
        )
    return matched


def _part(factors: LowRank, place: Place) -> LowRank:
    a, b = factors
    return factors if (place.start, place.end) == (0, b.shape[-1]) else LowRank(a, b[..., place.start : place.end])


def _in_all(factors: LowRank, layers: tuple[int, ...], count: int) -> LowRank:
    """The factors of all layers, zero where there are none."""
    if len(layers) == count or not layers:
        return factors

    def spread(factor: Array) -> Array:
        return jnp.zeros((count, *factor.shape[1:]), factor.dtype).at[jnp.asarray(layers)].set(factor)

    return LowRank(*map(spread, factors))


def scale_in_all(site: Site, count: int) -> float | tuple[float, ...]:
    """s of every layer, 0 for one without an adapter; one number where all are alike."""
    scales = dict(zip(site.layers, site.scales, strict=True)) if site.layers else {0: site.scales[0]}
    each = tuple(scales.get(layer, 0.0) for layer in range(max(1, count)))
    return each[0] if len(set(each)) == 1 else each


def _joined(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def split(model: LanguageModel) -> tuple[Base, Adapters] | None:
    """The base and the adapters of a model that has them; None where it has none."""
    flat = dict(nnx.to_flat_state(nnx.state(model.module)))
    kernels = {path: variable[...] for path, variable in flat.items() if isinstance(variable.get_value(), Adapted)}
    if not kernels:
        return None
    modules = linear_modules(model)
    scales: dict[str, float] = {}
    for name, (_, layer, places) in modules.items():
        kernel = kernels.get(places[0].path)
        if kernel is not None:
            each = kernel.scale
            scale = each[layer or 0] if isinstance(each, tuple) else each
            scales |= {name: scale} if scale else {}
    sites = sites_of(modules, scales)
    adapters = {}
    for site in sites:
        factors = [kernels[place.path].adapters[0] for place in site.places]
        a = factors[0].a
        b = factors[0].b if len(factors) == 1 else jnp.concatenate([factor.b for factor in factors], axis=-1)
        if site.layers and len(site.layers) < a.shape[0]:
            a, b = (factor[jnp.asarray(site.layers)] for factor in (a, b))
        adapters[site.name] = LowRank(a, b)
    bare = {path: variable.replace(kernels[path].weight) for path, variable in flat.items() if path in kernels}
    dropout = next(iter(kernels.values())).dropout
    return Base(nnx.from_flat_state((flat | bare).items()), tuple(sites), dropout), adapters


def on_base(model: LanguageModel, base: Base) -> tuple[bool, Adapters | None]:
    """Whether a model has the numbers of a base, but for adapters at its sites; and these, or None for none."""
    parts = split(model)
    own, adapters = (Base(nnx.state(model.module), ()), None) if parts is None else parts
    leaves, shared = (jax.tree.leaves_with_path(each.params) for each in (own, base))
    same = [path for path, _ in leaves] == [path for path, _ in shared] and all(
        mine is theirs or (mine.shape == theirs.shape and mine.dtype == theirs.dtype and bool((mine == theirs).all()))
        for (_, mine), (_, theirs) in zip(leaves, shared, strict=True)
    )
    return same and own.sites in ((), base.sites), adapters


def with_adapters(model: LanguageModel, base: Base, adapters: Adapters) -> LanguageModel:
    """The model on the base with these adapters."""
    return replace(model, module=nnx.merge(nnx.graphdef(model.module), base.adapted(adapters)))


def merged(model: LanguageModel) -> LanguageModel:
    """The model with its adapter added to its kernels, W + s·A B, in arrays of its own where there was one.

    Logits are those of the model with its adapter, but for rounding. Of a model in int8 the base is what int8 kept of
    it, with a `ModelWarning`: for the one in its files, load the saved adapter, which names it, and merge that.
    """
    params = nnx.state(model.module)
    if is_quantized(params):
        warnings.warn(
            "a model in int8 is merged with what int8 kept of its base. To merge its adapter into the base itself, "
            "save the model, which writes the adapter, and merge what is loaded from there: fastpref merge",
            ModelWarning,
            stacklevel=2,
        )
    flat = [
        (path, variable.replace(dense(variable[...])) if isinstance(variable.get_value(), KINDS) else variable)
        for path, variable in nnx.to_flat_state(params)
    ]
    return model.with_module(nnx.merge(nnx.graphdef(model.module), nnx.from_flat_state(flat)))
