"""Tasks with the model of pixel-art faces that comes with the package, which has seen no glasses, hats and beards.

Every attribute of every face is known, and a classifier reads them from samples.
"""

import functools

import numpy as np
from task import NUM_REFS, Draw, Task, split, split_pool

from mmdjax import IMQ, Delta, Particles, Product, load_faces
from mmdjax.faces import ATTRIBUTES, CLASSES, HAIR, HAIR_COLOURS, attribute_features, faces_with, pool, read_attributes

NUM_SAMPLES, NUM_STEPS = 100, 25  # a network call is costly
COLOURS = list(HAIR_COLOURS)
PRIOR_COLOURS = {name: colour.share for name, colour in HAIR_COLOURS.items()}


def _task(name, draw, **more):
    model, params = load_faces()
    settings = {"methods": "few", "features": attribute_features, "identity": _identity} | more
    return Task(name, model, params, draw, num_samples=NUM_SAMPLES, num_steps=NUM_STEPS, **settings)


def _identity(x, leave_out=""):
    # hair, its colour and skin as one number
    seen, found = read_attributes(x), np.zeros(len(x), int)
    for name, count in CLASSES.items():
        if name != leave_out:
            found = found * count + seen[name]
    return found


def _to(attribute, methods):
    faces = faces_with(attribute).images
    _, name, value = ATTRIBUTES[attribute]

    return _task(
        f"faces: {attribute.replace('-', ' ')}",
        functools.partial(split_pool, faces, num_fresh=NUM_SAMPLES),
        methods=methods,
        wanted=lambda x, groups: read_attributes(x)[name] == value,
        identity=lambda x: _identity(x, leave_out=name),
    )


def faces_glasses() -> Task:
    """All wear glasses."""
    return _to("glasses", "network")


def faces_hats() -> Task:
    """All wear hats."""
    return _to("hat", "few")


def faces_beards() -> Task:
    """All have beards."""
    return _to("beard", "few")


def faces_long_hair() -> Task:
    """All have long hair, as a quarter of the source has."""
    return _to("long-hair", "few")


def faces_auburn_hair() -> Task:
    """All have auburn hair, as 15% of the source have."""
    return _to("auburn-hair", "few")


def _colours(name, proportions, **more):
    source = pool("source")
    parts = [source.images[source.attributes["hair_colour"] == COLOURS.index(colour)] for colour in proportions]
    shares = np.array([*proportions.values()])
    numbers = np.repeat([COLOURS.index(colour) for colour in proportions], list(map(len, parts)))
    faces = np.concatenate(parts)
    # how many faces such a draw can have before its scarcest colour is used up, 4 standard deviations off
    scarcest = min((np.sqrt(len(part) / p + 4 * (1 - p) / p) - 2 * np.sqrt((1 - p) / p)) ** 2
                   for part, p in zip(parts, shares, strict=True))  # fmt: skip

    def draw(seed, num_refs=NUM_REFS):
        rng = np.random.default_rng(seed)
        wanted = rng.choice([*map(COLOURS.index, proportions)], size=int(scarcest), p=shares)
        rows = np.empty(len(wanted), int)
        for colour in np.unique(wanted):  # each its own, without replacement
            places = np.flatnonzero(wanted == colour)
            rows[places] = rng.permutation(np.flatnonzero(numbers == colour))[: len(places)]
        return split(faces[rows], num_refs, NUM_SAMPLES)

    return _task(
        name,
        draw,
        classify=lambda x: read_attributes(x)["hair_colour"],
        proportions=np.array([proportions.get(colour, 0.0) for colour in COLOURS]),
        identity=lambda x: _identity(x, leave_out="hair_colour"),
        **more,
    )


def faces_colours() -> Task:
    """Half have blond hair, three in ten auburn, two in ten red: of the source 22%, 15% and 6% do."""
    return _colours("faces: hair colours 5:3:2", {"blond": 0.5, "auburn": 0.3, "red": 0.2})


def faces_as_they_are() -> Task:
    """The source itself."""
    return _colours("faces as they are", PRIOR_COLOURS, as_it_is=True)


def faces_rare_twice() -> Task:
    """The source with green hair twice as frequent, 10% in place of 5%."""
    others = {name: share * 0.9 / 0.95 for name, share in PRIOR_COLOURS.items() if name != "green"}
    return _colours("faces: twice as much green hair", others | {"green": 0.1}, as_it_is=True)


def faces_prompted() -> Task:
    """Hair is the condition, and says the accessory: short hair comes with glasses, long hair with hats."""
    hair = {"short": ("glasses", "glasses"), "long": ("hats", "hat")}
    numbers = [list(HAIR).index(name) for name in hair]
    parts = {}
    for number, (sheet, _) in zip(numbers, hair.values(), strict=True):
        faces = pool(sheet)
        parts[number] = faces.images[faces.attributes["hair"] == number]

    def conditions(counts):
        return np.repeat([[n, CLASSES["hair_colour"], CLASSES["skin"]] for n in numbers], counts, axis=0).astype(
            np.int32
        )

    def particles(images):
        return Particles(np.concatenate(images), cond=conditions([*map(len, images)]))

    def draw(seed, num_refs=NUM_REFS):
        draws = [split_pool(images, seed, num_refs // 2, NUM_SAMPLES // 2) for images in parts.values()]
        return Draw(*map(particles, zip(*draws, strict=True)))

    def wanted(x, groups):
        seen = read_attributes(x)
        return np.select([groups == number for number in numbers], [seen[name] == 1 for _, name in hair.values()])

    return _task(
        "faces: short with glasses, long with hats",
        draw,
        wanted=wanted,
        identity=None,
        cond=conditions(NUM_SAMPLES // 2),
        group_of=lambda cond: np.asarray(cond)[:, 0],
        kernel=Product(x=IMQ(), cond=Delta()),
    )
