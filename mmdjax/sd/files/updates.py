"""What a LoRA does to one weight: the forms in which its change is stored.

A weight W, [out, in] or [out, in, h, w], becomes W + s ΔW with a strength s. With a = alpha/rank, ΔW is

    LoRA   a · up down                                       up [out, r], down [r, in] or [r, in, h, w]
           a · Σ_pq up[o, p] mid[p, q, h, w] down[q, i]      with a core (Tucker)
    LoHa   a · (w1_a w1_b) ∘ (w2_a w2_b)                     elementwise; each may have a core
    LoKr   a · w1 ⊗ w2                                       Kronecker; each whole, a product, or with a core
    full   diff

and with a magnitude m (DoRA), of any of these,

    ΔW_DoRA = m (W + ΔW)/‖W + ΔW‖ − W                        norms of rows, in some files of columns.

So the strength moves along the line from the plain weight to the one that was trained, and the changes of several files
add up, in any order. (PEFT scales ΔW inside the norm, which is the same at strength 1 alone.)

References:
  Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2022 (FedPara, here LoHa), Yeh et al. 2024 (LyCORIS: LoKr, cores), Liu et al.
  2024 (DoRA).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdjax.checkpoint import CheckpointError

NAMES = {  # of the parts in errors
    "lora_a": "lora_up (lora_B)",
    "lora_b": "lora_down (lora_A)",
    **{f"hada{n}_{part}": f"hada_w{n}_{part}" for n in "12" for part in "ab"},
    **{f"lokr{n}": f"lokr_w{n}" for n in "12"},
    **{f"lokr{n}_{part}": f"lokr_w{n}_{part}" for n in "12" for part in "ab"},
}


@dataclasses.dataclass(frozen=True)
class Update:
    """The change of one weight, read when it is used.

    Args:
      name: in error messages.
      parts: entries of a checkpoint: "lora_a" (up), "lora_b" (down), "lora_t" (the core); "hada1_a", …; "lokr1", …;
        "diff"; and "rows" or "dora_scale" (magnitudes) beside them.
      scale: a.
    """

    name: str
    parts: Mapping[str, Any]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of ΔW; in the file a kernel may be flat.

        Raises:
          CheckpointError: parts are missing, or do not multiply.
        """
        first, second = self._factors
        shape = self._shape(first)
        if second is None:
            return shape
        other = self._shape(second)
        if first == "hada1":
            if shape != other:
                raise CheckpointError(f"{self.name}: its two factors are {list(shape)} and {list(other)}")
            return shape
        return (shape[0] * other[0], shape[1] * other[1], *other[2:])

    @property
    def rank(self) -> int | None:
        """r; None where nothing is a product."""
        found = [part for part in ("lora_b", "hada1_b", "lokr2_b", "lokr1_b") if part in self.parts]
        return self.parts[found[0]].shape[0] if found else None

    @property
    def magnitudes(self) -> bool:
        """Whether it is a DoRA, whose change depends on the weight."""
        return "rows" in self.parts or "dora_scale" in self.parts

    def value(self) -> np.ndarray:
        """ΔW without magnitudes, of `shape`; float32."""
        first, second = self._factors
        change = self._product(first)
        if second is not None:
            other = self._product(second)
            change = change * other if first == "hada1" else _kron(change, other)
        return self.scale * change

    def change(self, weight: np.ndarray) -> np.ndarray:
        """ΔW of a weight, of its shape; float32."""
        change = self.value().reshape(weight.shape)
        if not self.magnitudes:
            return change
        moved = weight.astype(np.float32) + change
        magnitude, axis = self._magnitude(weight.shape)
        norm = np.sqrt(np.square(moved).sum(axis=tuple(i for i in range(moved.ndim) if i != axis), keepdims=True))
        return moved * (magnitude.reshape(norm.shape) / np.maximum(norm, np.finfo(np.float32).tiny)) - weight

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this changes a weight of this shape."""
        mine = self.shape
        fits = bool(mine) and mine[0] == shape[0] and math.prod(mine) == math.prod(shape)
        fits = fits and (len(mine) != len(shape) or mine == shape)
        if fits and self.magnitudes:
            axis = self._axis(shape)
            (part,) = (self.parts[name] for name in ("rows", "dora_scale") if name in self.parts)
            fits = math.prod(part.shape) == shape[axis]
        return fits

    @property
    def _factors(self) -> tuple[str, str | None]:
        """The factors by name; CheckpointError if a part of one is missing."""
        kinds = {name[:4] for name in self.parts} & {"lora", "hada", "lokr", "diff"}
        if len(kinds) != 1:
            raise CheckpointError(f"{self.name} mixes {', '.join(sorted(kinds)) or 'no'} parts")
        (kind,) = kinds
        factors = (kind, None) if kind in ("lora", "diff") else (f"{kind}1", f"{kind}2")
        for factor in filter(None, factors):
            lacking = [part for part in (f"{factor}_a", f"{factor}_b") if part not in self.parts]
            if factor not in self.parts and lacking:
                raise CheckpointError(f"{self.name} lacks its {' and its '.join(NAMES[part] for part in lacking)}")
        return factors

    def _shape(self, factor: str) -> tuple[int, ...]:
        if factor in self.parts:
            if len(self.parts[factor].shape) < 2 and factor != "diff":
                raise CheckpointError(f"{self.name}: its {NAMES[factor]} is no matrix")
            return self.parts[factor].shape
        a, b = self.parts[f"{factor}_a"].shape, self.parts[f"{factor}_b"].shape
        core = self.parts[f"{factor}_t"].shape if f"{factor}_t" in self.parts else None
        if core is None:
            out, inner, rest = a[:1], math.prod(a[1:]), b[1:]
            sound = len(a) > 1 and len(b) > 1 and inner == b[0]
        else:  # LoHa's and LoKr's first factor lies transposed
            sides = a[:2] if factor == "lora" else a[1::-1]
            sound = len(core) > 2 and len(sides) == 2 and len(b) > 1 and core[:2] == (sides[1], b[0])
            out, rest = sides[:1], (*b[1:2], *core[2:])
        if not sound:
            shapes = " and ".join(str(list(shape)) for shape in (a, b, core) if shape is not None)
            raise CheckpointError(f"{self.name}: its factors {shapes} do not multiply")
        return (*out, *rest)

    def _product(self, factor: str) -> np.ndarray:
        if factor in self.parts:
            return self._read(factor)
        a, b = self._read(f"{factor}_a"), self._read(f"{factor}_b")
        rows = a.reshape(len(a), -1)
        if f"{factor}_t" not in self.parts:
            return (rows @ b.reshape(len(b), -1)).reshape(len(a), *b.shape[1:])
        rows = rows.T if factor == "lora" else rows
        core = self._read(f"{factor}_t")
        return np.einsum("pq...,po,qi->oi...", core, rows, b.reshape(len(b), -1), optimize=True)

    def _read(self, part: str) -> np.ndarray:
        array = self.parts[part].read().astype(np.float32)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.name} holds values that are not finite")
        return array

    def _axis(self, shape: tuple[int, ...]) -> int:
        """Along which axis of the weight the magnitudes lie: LyCORIS's older files have one for each column."""
        stored = () if "rows" in self.parts else self.parts["dora_scale"].shape
        return int(len(stored) > 1 and stored[0] == 1 and shape[0] != 1)

    def _magnitude(self, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
        return self._read("rows" if "rows" in self.parts else "dora_scale"), self._axis(shape)


def _kron(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # over the two leading axes; what follows them is the second's
    return np.kron(a.reshape(*a.shape, *(1,) * (b.ndim - a.ndim)), b)
