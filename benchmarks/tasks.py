"""The alignment tasks, in the order of the tables, each a function that makes it."""

from digit_tasks import digits_as_they_are, digits_prompted
from face_tasks import (
    faces_as_they_are,
    faces_auburn_hair,
    faces_beards,
    faces_colours,
    faces_glasses,
    faces_hats,
    faces_long_hair,
    faces_prompted,
    faces_rare_twice,
)
from gaussian_tasks import grid, grid_as_it_is, mixture_16d, mixture_as_it_is, moons, ring
from portrait_tasks import portraits_prompted, portraits_sunglasses

CORE = (ring, faces_glasses, faces_colours, faces_as_they_are)
TASKS = (
    ring, grid, moons, mixture_16d, digits_prompted,
    faces_glasses, faces_hats, faces_beards, faces_long_hair, faces_auburn_hair, faces_colours, faces_prompted,
    portraits_sunglasses, portraits_prompted,
    grid_as_it_is, mixture_as_it_is, digits_as_they_are, faces_as_they_are, faces_rare_twice,
)  # fmt: skip
