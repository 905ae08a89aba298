"""One table of what there is to combine: every public kernel, sampler, placement, rule and schedule.

Classes are found by scanning the package. Each is tried as `cls()`; one that needs arguments is made by a classmethod
`example()` of its own, or by its entry in `MADE`. A class with none of these is in `MISSING`, and a test fails for it.
"""

import importlib
import inspect
import pkgutil

import jax.numpy as jnp
import numpy as np

import mmdjax
from mmdjax import DDIM, DDPM, IMQ, RBF, Delta, Energy, Level, Mapped, Product, Sum, guidance
from mmdjax.guidance import Placement, Rule
from mmdjax.kernels import Kernel, Radial, as_kernel
from mmdjax.schedules import Discrete, RectifiedFlow

MADE = {
    "Sum": lambda: Sum(RBF(), Energy(), weights=(1.0, 0.5)),
    "Product": lambda: Product(x=RBF(), cond=Delta()),
    "Mapped": lambda: Mapped(jnp.tanh, RBF()),
    "Custom": lambda: as_kernel(lambda a, b: jnp.exp(a.x @ b.x.T / 5)),
    "Discrete": lambda: Discrete(np.array([0.9, 0.6, 0.2, 0.01])),
}
MORE = {  # beside the one of each class
    "RBF, three widths": RBF((0.5, 1.0, 2.0)),
    "IMQ, two widths": IMQ((0.5, 2.0)),
    "DDIM, eta 1": DDIM(eta=1.0),
    "DDPM, large": DDPM("large"),
    "RectifiedFlow, shifted": RectifiedFlow(shift=3.0),
}
INSIDE = {"Barycentric", "DiffusedRBF", "Delta", "Shield"}  # three of the guidance; labels alone have no gradient
WRAPPERS = {"Opaque", "GuidedSampler"}  # samplers around another
PAPER = {"Published"}  # a placement that only `MMDGuidance.paper` has, with a memory of its own: tests/test_paper.py


def _classes():
    for info in pkgutil.walk_packages(mmdjax.__path__, "mmdjax."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            for name, cls in vars(module).items():
                if inspect.isclass(cls) and cls.__module__ == info.name and not name.startswith("_"):
                    yield cls


def _is_schedule(cls):
    return "__call__" in vars(cls) and inspect.signature(cls.__call__).return_annotation is Level


def _is_sampler(cls):
    return hasattr(cls, "init") and hasattr(cls, "step") and not getattr(cls, "_is_protocol", False)


def _example(cls):
    if cls.__name__ in MADE:
        return MADE[cls.__name__]()
    return cls.example() if hasattr(cls, "example") else cls()


def _table(classes, left_out=()):
    found = {}
    for cls in classes:
        is_base = any(other is not cls and issubclass(other, cls) for other in classes)
        if is_base or cls.__name__ in left_out:
            continue
        try:
            found[cls.__name__] = _example(cls)
        except TypeError as error:
            MISSING.append(f"{cls.__module__}.{cls.__name__}: {error}")
    return found | {name: made for name, made in MORE.items() if type(made) in classes}


def _by_name(classes, named, left_out=()):
    """What `MMDGuidance` takes for each class: its name there, where it has one, else an instance."""
    names = {type(made): name for name, made in named.items()}
    leaves = [cls for cls in classes if cls not in (Placement, Rule) and cls.__name__ not in left_out]
    return {names.get(cls, cls.__name__): names.get(cls) or _example(cls) for cls in leaves}


MISSING: list[str] = []
_all = list(_classes())
KERNELS = _table([cls for cls in _all if issubclass(cls, Kernel)], INSIDE)
SAMPLERS = _table([cls for cls in _all if _is_sampler(cls)], WRAPPERS)
SCHEDULES = _table([cls for cls in _all if _is_schedule(cls)])
PLACEMENTS = _by_name([cls for cls in _all if issubclass(cls, Placement)], guidance.PLACEMENTS, PAPER)
RULES = _by_name([cls for cls in _all if issubclass(cls, Rule)], guidance.RULES)


def has_mass(kernel):
    """By what the kernel is made of, not by its own word: the kernels of the distance, sums and products of them."""
    match kernel:
        case Sum(kernels=parts):
            return all(map(has_mass, parts))
        case Product(x=part):
            return has_mass(part)
    return isinstance(kernel, Radial)


def diffusable(kernel):
    """Whether noise on the references has a closed form: an RBF, sums and products of them."""
    match kernel:
        case Sum(kernels=parts):
            return all(map(diffusable, parts))
        case Product(x=part):
            return diffusable(part)
    return isinstance(kernel, RBF)


def allowed(kernel, at, rule):
    """Whether the guidance can be built: mass needs a kernel of the distance, "length" a length, "diffused" an RBF."""
    if at == "diffused" and not diffusable(kernel):
        return False
    if rule == "shrunk" and at != "denoised":
        return False
    needs = {"field": "mass", "shrunk": "mass", "mass": "mass", "length": "length", "none": "", "raw": ""}
    needs = needs[rule] if rule in needs else RULES[rule].needs
    if needs == "length":
        return type(kernel).length2 is not Kernel.length2
    return needs != "mass" or has_mass(kernel)


def rules_of(kernel, at):
    """The rules that a kernel serves at a placement that it serves."""
    return [rule for rule in RULES if allowed(kernel, at, rule)]
