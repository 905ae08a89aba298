"""MMD Guidance in pure JAX: adapt a diffusion model to a small reference set while sampling, with no training.

Source: arXiv 2601.08379.
"""

from mmdjax._points.particles import Particles
from mmdjax._points.streaming import HostReferences
from mmdjax._version import __version__
from mmdjax.denoisers import DiffusionModel, cfg, from_model
from mmdjax.digits import load_digits
from mmdjax.faces import load_faces
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.advice import GuidanceWarning
from mmdjax.guidance.avoid import Avoid
from mmdjax.guidance.wrappers import guide_denoiser, guide_sampler
from mmdjax.kernels import (
    IMQ,
    RBF,
    Cosine,
    Delta,
    Energy,
    Laplacian,
    Linear,
    Mapped,
    Matern32,
    Matern52,
    Polynomial,
    Product,
    RationalQuadratic,
    Sum,
    median_bandwidth,
)
from mmdjax.memory import Memory
from mmdjax.mmd import mmd2, witness
from mmdjax.runs import load_samples, sample_many
from mmdjax.samplers import DDIM, DDPM, DPMSolverPP2M, EulerMaruyama, Heun, SDEDPMSolverPP2M
from mmdjax.sampling import Samples, guided_sample
from mmdjax.schedules import Level
from mmdjax.suggest import suggest_guidance

__all__ = [
    "DDIM",
    "DDPM",
    "IMQ",
    "RBF",
    "Avoid",
    "Cosine",
    "DPMSolverPP2M",
    "Delta",
    "DiffusionModel",
    "Energy",
    "EulerMaruyama",
    "GuidanceWarning",
    "Heun",
    "HostReferences",
    "Laplacian",
    "Level",
    "Linear",
    "MMDGuidance",
    "Mapped",
    "Matern32",
    "Matern52",
    "Memory",
    "Particles",
    "Polynomial",
    "Product",
    "RationalQuadratic",
    "SDEDPMSolverPP2M",
    "Samples",
    "Sum",
    "__version__",
    "cfg",
    "from_model",
    "guide_denoiser",
    "guide_sampler",
    "guided_sample",
    "load_digits",
    "load_faces",
    "load_samples",
    "median_bandwidth",
    "mmd2",
    "sample_many",
    "suggest_guidance",
    "witness",
]
