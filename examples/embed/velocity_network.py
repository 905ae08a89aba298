"""An NNX network with `pred(x, t, **kwargs)`, t [n], that returns the velocity ε − x_0: diffuse_nnx.

`Guided` has the form of its `interfaces.continuous.SiTInterface` (0.1.0), so that its samplers take it as their `net`.
One trap: these samplers do classifier-free guidance themselves, g + scale · (net − g). Around `net` alone, the shift
towards the references would be extrapolated with the rest: `scale` times as far, or, if the sampler takes the guided
net for g too, by `scale` times the difference of two shifts. So `Guided` mixes the two predictions itself, then
guides the mixture, and the sampler is left with guidance_scale=1.

    python examples/embed/velocity_network.py
"""

import jax
import jax.numpy as jnp
from flax import nnx
from world import GIVEN, NUM_SAMPLES, NUM_STEPS, references, report, x0_hat

from mmdjax import Level, MMDGuidance, guide_denoiser


class Guided(nnx.Module):
    """x̂0 = x − t · velocity, guided, as a velocity again."""

    def __init__(self, net, refs, guidance=MMDGuidance(), g_net=None, guidance_scale=1.0):
        self.net, self.g_net, self.guidance_scale = net, g_net, guidance_scale
        self.guide = nnx.data(guide_denoiser(GIVEN, guidance, refs))

    def pred(self, x_t, t, *args, **kwargs):
        velocity = self.net.pred(x_t, t, *args, **kwargs)
        if self.guidance_scale != 1.0:
            null = {k: jnp.full_like(v, 1000) if k == "y" else v for k, v in kwargs.items()}
            g = (self.g_net or self.net).pred(x_t, t, *args, **null)
            velocity = g + self.guidance_scale * (velocity - g)
        time = self.bcast_right(t, x_t)
        x0 = self.guide(x_t - time * velocity, x_t, Level(t, 1 - t, t), None)
        return (x_t - x0) / time

    def score(self, x_t, t, *args, **kwargs):
        time = self.bcast_right(t, x_t)
        return -(x_t + (1 - time) * self.pred(x_t, t, *args, **kwargs)) / time

    @staticmethod
    def bcast_right(x, y):
        return x.reshape(x.shape + (1,) * (y.ndim - x.ndim))


# --- a stand-in for the package ---------------------------------------------------------------------------------------


class SiTInterface(nnx.Module):
    """The label y makes the data larger; 1000 is the null label."""

    def __init__(self, rngs):
        self.size, self.dropout = nnx.Param(jnp.float32(0.1)), nnx.Dropout(0.1, rngs=rngs)

    def pred(self, x_t, t, *args, y):
        t = t[:, None]
        larger = 1 + self.size * jnp.where(y == 1000, 0, y)[:, None]
        return self.dropout((x_t - larger * x0_hat(x_t, 1 - t, t)) / t)


def euler(net, x, timegrid, g_net=None, guidance_scale=1.0, **net_kwargs):
    """As `EulerSampler.sample`: the nets ride in the carry of an `nnx.scan`."""

    def step(carry, ends):
        net, g_net, x = carry
        t = jnp.full(len(x), ends[0])
        velocity = net.pred(x, t, **net_kwargs)
        if guidance_scale != 1.0:
            null = {k: jnp.full_like(v, 1000) if k == "y" else v for k, v in net_kwargs.items()}
            g = (g_net or net).pred(x, t, **null)
            velocity = g + guidance_scale * (velocity - g)
        return (net, g_net, x + (ends[1] - ends[0]) * velocity), None

    scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return scan((net, g_net, x), jnp.stack([timegrid[:-1], timegrid[1:]], axis=1))[0][2]


def main():
    net = SiTInterface(nnx.Rngs(0))
    net.eval()  # Dropout off
    x, y = jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 2)), jnp.zeros(NUM_SAMPLES, int)
    times, scale = jnp.linspace(1.0, 0.0, NUM_STEPS + 1), 1.5
    guided = Guided(net, references(), guidance_scale=scale)
    return report(unguided=euler(net, x, times, guidance_scale=scale, y=y), guided=euler(guided, x, times, y=y))


if __name__ == "__main__":
    main()
