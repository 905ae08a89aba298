"""Tasks with the model of handwritten digits that comes with the package."""

import functools

import numpy as np
from task import NUM_REFS, NUM_SAMPLES, Draw, Task, split_pool

from mmdjax import IMQ, Delta, Particles, Product, load_digits
from mmdjax.digits import slant, splits, thicken


def digits_thick() -> Task:
    """Held-out digits with thickened strokes; for sweeps."""
    model, params = load_digits()
    _, (images, _) = splits()
    thick = thicken(images)
    return Task("digits: thickened strokes", model, params, functools.partial(split_pool, thick))


def digits_as_they_are() -> Task:
    """Held-out digits, none of them changed."""
    model, params = load_digits()
    _, (images, _) = splits()
    draw = functools.partial(split_pool, images)
    return Task("digits as they are", model, params, draw, methods="few", as_it_is=True)


def digits_prompted() -> Task:
    """Class-conditional digits whose style depends on the class: 3s and 9s thick, 5s and 8s slanted.

    The label is the condition. These four look alike; of 3 and 7, say, the pictures alone tell the style, and any
    kernel will do. References are held-out images, as many of each class. A class has some 178 images in all, so those
    that are left, the model's training images among them, make two disjoint sets, weighted to equal shares: fresh
    samples and the rest. Both come from one finite pool without replacement, so a perfect method's energy is a little
    below 0 here.
    """
    model, params = load_digits()
    styles = {3: thicken, 5: slant, 8: slant, 9: thicken}
    cond = np.repeat(np.array(list(styles), np.int32), NUM_SAMPLES // len(styles))

    def draw(seed, num_refs=NUM_REFS):
        parts = _by_class(np.random.default_rng(seed), dict.fromkeys(styles, num_refs // len(styles)))
        styled = {c: [styles[c](images) for images in three] for c, three in parts.items()}
        shares = dict.fromkeys(styles, 1 / len(styles))
        refs, fresh, rest = (_weighted(part, shares) for part in zip(*styled.values(), strict=True))
        return Draw(refs, fresh, rest)

    kernel = Product(x=IMQ(), cond=Delta())
    return Task("digits: 3, 9 thick, 5, 8 slanted", model, params, draw, cond=cond, kernel=kernel)


def _by_class(rng, counts):
    # class -> (references, held out; half of all that is left; the other half)
    train, held_out = splits()
    parts = {}
    for c, count in counts.items():
        mine = rng.permutation(held_out[0][held_out[1] == c])
        if count > len(mine):
            raise ValueError(f"{count} references of class {c} are wanted; {len(mine)} images of it are held out")
        left = rng.permutation(np.concatenate([mine[count:], train[0][train[1] == c]]))
        parts[c] = mine[:count], left[: len(left) // 2], left[len(left) // 2 :]
    return parts


def _weighted(parts, proportions):
    # class by class, weighted so that the classes have their proportions; cond is the class
    weight = [np.full(len(part), p / len(part)) for part, p in zip(parts, proportions.values(), strict=True)]
    labels = np.repeat(list(proportions), list(map(len, parts))).astype(np.int32)
    return Particles(np.concatenate(parts), cond=labels, weight=np.concatenate(weight).astype(np.float32))
