"""Architecture from a checkpoint's config.json: what the file says, and nothing guessed from a name.

A configuration is a frozen dataclass whose fields carry the JSON's own names, so that reading is copying. A setting
that changes the network and is not implemented here is an error that names it, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the configurations; `FIXED` holds the settings that have one implemented value."""

    FIXED: ClassVar[Mapping[str, Any]] = {}
    CLASSES: ClassVar[tuple[str, ...]] = ()
    OPEN: ClassVar[bool] = False  # whether unknown keys are harmless: transformers' configs carry training settings

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Any:
        """The configuration in a parsed config.json; keys left out take the default of the library that wrote the file.

        Raises:
          ValueError: the file is another model's, or sets what is not implemented here; all such settings are listed.
        """
        found = raw.get("_class_name") or (raw.get("architectures") or [None])[0]
        if found is not None and found not in cls.CLASSES:
            raise ValueError(f"this config.json is of {found!r}, not of {' or '.join(cls.CLASSES)}")
        names = {field.name for field in dataclasses.fields(cls)}
        problems = []
        for key, value in raw.items():
            if key in cls.FIXED and frozen(value) != cls.FIXED[key] and value is not None:
                problems.append(f"{key} = {value!r} (implemented: {cls.FIXED[key]!r})")
            known = key in names or key in cls.FIXED or key.startswith("_") or cls.OPEN
            if not known and value not in (None, False):
                problems.append(f"{key} = {value!r} (unknown)")
        if problems:
            raise ValueError(
                f"{found or cls.CLASSES[0]} with settings that mmdjax.sd does not implement: " + "; ".join(problems)
            )
        return cls(**{key: frozen(value) for key, value in raw.items() if key in names})


def frozen(value: Any) -> Any:
    """JSON lists as tuples, so that a configuration can be hashed."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def per_level(value: Any, levels: int) -> tuple:
    """One value a level of resolution: a number stands for all of them."""
    return value if isinstance(value, tuple) else (value,) * levels
