"""Architecture from a checkpoint's config.json; nothing is guessed from a name.

A configuration is a frozen dataclass with the JSON's names. A setting that changes the network and is not implemented
here is an error that names it; it is never ignored.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

# diffusers 0.27 and before had one class for these; which of them it is, is in "norm_type"
TRANSFORMERS = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
MAX_LEVELS, MAX_BLOCKS = 12, 2000  # Stable Diffusion XL's U-Net has 3 and some 150
HARMLESS = {"dropout", "attention_dropout", "gradient_checkpointing"}  # without effect when sampling
HARMLESS |= {
    "decay",
    "min_decay",
    "inv_gamma",
    "power",
    "use_ema_warmup",
    "update_after_step",
    "optimization_step",
}  # EMA


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the configurations; `FIXED` holds the settings of which only one value is implemented."""

    FIXED: ClassVar[Mapping[str, Any]] = {}
    CLASSES: ClassVar[tuple[str, ...]] = ()
    OPEN: ClassVar[bool] = False  # whether unknown keys are harmless: transformers' configs carry training settings

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Any:
        """The configuration in a parsed config.json; missing keys take the default of the library that wrote it.

        Raises:
          ValueError: the file is of another kind of model, or has settings that are not implemented, all listed.
        """
        found = class_name(raw)
        if found is not None and found not in cls.CLASSES:
            raise ValueError(f"this config.json is of {found!r}, not of {' or '.join(cls.CLASSES)}")
        names = {field.name for field in dataclasses.fields(cls)}
        problems = []
        for key, value in raw.items():
            if key in cls.FIXED and frozen(value) != cls.FIXED[key] and value is not None:
                problems.append(f"{key} = {value!r} (implemented: {cls.FIXED[key]!r})")
            known = key in names or key in cls.FIXED or key.startswith("_") or cls.OPEN
            if not known and key not in HARMLESS and value not in (None, False):
                problems.append(f"{key} = {value!r} (unknown)")
        if problems:
            raise ValueError(
                f"{found or cls.CLASSES[0]} with settings that mmdjax.sd does not implement: " + "; ".join(problems)
            )
        given = {key: frozen(value) for key, value in raw.items() if key in names}
        hints = typing.get_type_hints(cls)
        wrong = [f"{key} is {raw[key]!r}" for key, value in given.items() if not _fits(value, hints[key])]
        if wrong:
            raise ValueError(f"{found or cls.CLASSES[0]} with settings of another kind: " + "; ".join(wrong))
        try:
            return cls(**given)
        except (ArithmeticError, TypeError, IndexError) as error:
            raise ValueError(f"{found or cls.CLASSES[0]} with settings that do not fit each other: {error}") from error


def class_name(raw: Mapping[str, Any]) -> Any:
    """The class that a config.json names; None if it names none."""
    architectures = raw.get("architectures")
    if raw.get("_class_name") == "Transformer2DModel":
        return TRANSFORMERS.get(str(raw.get("norm_type")), "Transformer2DModel")
    return raw.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else None)


def check_size(config: Any, blocks: int, levels: int = 1) -> None:
    """Raise ValueError for a network of absurdly many blocks or levels, which would take forever to build."""
    if blocks > MAX_BLOCKS or levels > MAX_LEVELS:
        raise ValueError(
            f"{type(config).__name__} describes a network of {levels:,} levels and {blocks:,} blocks; at most "
            f"{MAX_LEVELS} and {MAX_BLOCKS:,}"
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; integers must be possible sizes or counts."""
    if hint is Any:
        return True
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint is int:
        return type(value) is int and 0 <= value < 2**31
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint)


def frozen(value: Any) -> Any:
    """JSON lists as tuples, so that a configuration can be hashed."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def per_level(value: Any, levels: int) -> tuple:
    """One value for each level of resolution; a number holds for all levels."""
    return value if isinstance(value, tuple) else (value,) * levels
