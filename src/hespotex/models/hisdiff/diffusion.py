"""Gaussian diffusion of a vector: noise schedule, training loss and samplers; knows nothing of networks.

Denoising diffusion with a learned variance (Ho et al. 2020; Nichol and Dhariwal 2021), as HisDiff and Stem use it, the
deterministic sampler of Song et al. (2021), and the second-order multistep solver of Lu et al. (2022). A network is a
callable that maps noisy values (n, G) and a time to an estimate of the noise and to the variance's interpolation value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataValueError

__all__ = ["Likelihood", "Output", "Sampler", "Schedule", "Tables", "denoising_terms", "sample", "spaced"]

N_TIMES = 1000
Likelihood = Literal["discrete", "gaussian", "none"]
Output = Literal["noise", "velocity"]
Sampler = Literal["ddpm", "ddim", "dpm++"]
Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # noisy values, time -> noise estimate, interpolation value

_LN2 = math.log(2.0)


def spaced(n_times: int, steps: int) -> np.ndarray:
    """`steps` of the times 0 … `n_times` − 1, the first and the last among them, as evenly as whole numbers allow.

    Multiples of (n_times − 1) / (steps − 1), accumulated and rounded half to even, as the published code does.

    Examples
    --------
    >>> spaced(1000, 5).tolist()
    [0, 250, 500, 749, 999]
    """
    if not 1 <= steps <= n_times:
        raise DataValueError(f"steps={steps} must lie between 1 and {n_times}")
    stride = (n_times - 1) / (steps - 1) if steps > 1 else 1.0
    place, times = 0.0, []
    for _ in range(steps):
        times.append(round(place))
        place += stride
    return np.array(times, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise each step adds, in double precision.

    Attributes
    ----------
    betas
        Variance that each kept step adds, (K,).
    times
        Time of each kept step as the network knows it, (K,).
    """

    betas: np.ndarray
    times: np.ndarray

    @classmethod
    def linear(cls, n_times: int = N_TIMES, first: float = 1e-4, last: float = 0.02) -> Schedule:
        """Betas that grow linearly."""
        return cls(np.linspace(first, last, n_times), np.arange(n_times))

    def keeping(self, kept: np.ndarray) -> Schedule:
        """The schedule that visits only the steps `kept`, ascending."""
        left = self.alphas_cumprod[kept]
        return Schedule(1.0 - left / np.append(1.0, left[:-1]), self.times[kept])

    def respaced(self, steps: int) -> Schedule:
        """The schedule of `steps` evenly spaced steps."""
        return self.keeping(spaced(len(self), steps))

    def even_in_signal(self, steps: int) -> Schedule:
        """At most `steps` steps, evenly spaced in log signal-to-noise, as the solver of second order wants them."""
        ratio = np.log(1.0 / self.alphas_cumprod - 1.0)
        wanted = np.linspace(ratio[0], ratio[-1], steps)
        kept = np.searchsorted(ratio, wanted - 1e-9).clip(0, len(self) - 1)
        return self.keeping(np.unique(kept))

    def for_sampler(self, method: Sampler, steps: int) -> Schedule:
        """The steps that `method` takes when it may take `steps`."""
        if steps == len(self):
            return self
        return self.even_in_signal(steps) if method == "dpm++" else self.respaced(steps)

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal's variance that is left after each step."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """The same before each step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of the previous step's values, given these and the clean ones; 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm, where the first step takes the value of the second."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(self) > 1 else self.betas[:1], variance[1:]))

    @cached_property
    def posterior_mean_clean(self) -> np.ndarray:
        """Weight of the clean values in the mean of the previous step's values."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_noisy(self) -> np.ndarray:
        """Weight of this step's values in it."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    def tables(self, device: torch.device | None = None) -> Tables:
        """What steps need, as float32 columns on `device`."""
        left = self.alphas_cumprod

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(device)[:, None]

        return Tables(
            signal=column(np.sqrt(left)),
            noise=column(np.sqrt(1.0 - left)),
            clean_noisy=column(np.sqrt(1.0 / left)),
            clean_noise=column(np.sqrt(1.0 / left - 1.0)),
            mean_clean=column(self.posterior_mean_clean),
            mean_noisy=column(self.posterior_mean_noisy),
            log_beta=column(np.log(self.betas)),
            log_variance=column(self.posterior_log_variance),
        )


class Tables(NamedTuple):
    """Coefficients of each step, (K, 1) float32 each.

    Attributes
    ----------
    signal, noise
        Of clean values and noise in the noisy values.
    clean_noisy, clean_noise
        Of noisy values and (subtracted) noise in the clean values.
    mean_clean, mean_noisy, log_variance
        Of clean and noisy values in the posterior mean; log of its variance.
    log_beta
        Log of the variance that the step adds.
    """

    signal: Tensor
    noise: Tensor
    clean_noisy: Tensor
    clean_noise: Tensor
    mean_clean: Tensor
    mean_noisy: Tensor
    log_beta: Tensor
    log_variance: Tensor

    def noisy(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Values after `step`, (n, G), from clean values, noise (n, G) and steps (n,)."""
        return self.signal[step] * clean + self.noise[step] * noise

    def noise_of(self, output: Tensor, noisy: Tensor, step: Tensor | int, kind: Output) -> Tensor:
        """Estimate of the noise that an output of the network stands for.

        ``"velocity"`` (Salimans and Ho 2022) is the output ``signal · noise − (share of noise) · clean``: 0 is then
        the best estimate for values of unit variance of which nothing is known, and an error of the output is one of
        the clean values of at most its size, where an error of the noise grows up to 157 times.
        """
        return output if kind == "noise" else self.noise[step] * noisy + self.signal[step] * output

    def clean(self, noisy: Tensor, noise: Tensor, step: Tensor | int) -> Tensor:
        """Clean values that noisy values and an estimate of the noise stand for."""
        return self.clean_noisy[step] * noisy - self.clean_noise[step] * noise

    def posterior_mean(self, clean: Tensor, noisy: Tensor, step: Tensor | int) -> Tensor:
        """Mean of the values one step earlier."""
        return self.mean_clean[step] * clean + self.mean_noisy[step] * noisy

    def learned_log_variance(self, interpolation: Tensor, step: Tensor | int) -> Tensor:
        """Log variance between the posterior's (interpolation −1) and the step's own (+1)."""
        share = (interpolation + 1.0) / 2.0
        return share * self.log_beta[step] + (1.0 - share) * self.log_variance[step]


def denoising_terms(
    tables: Tables,
    clean: Tensor,
    noisy: Tensor,
    noise: Tensor,
    step: Tensor,
    output: Tensor,
    interpolation: Tensor,
    likelihood: Likelihood,
    kind: Output = "noise",
) -> tuple[Tensor, Tensor | None]:
    """Squared error of the network's output, and the variational term in bits per gene, (n,) each.

    Parameters
    ----------
    clean, noisy, noise
        Values before and after the noise, and the noise, (n, G).
    step
        Step of each row, (n,).
    output, interpolation
        What the network returns, (n, G) each.
    likelihood
        Of the clean values at the first step: ``"discrete"`` bins of 1/255 in [−1, 1] as published, ``"gaussian"``;
        ``"none"`` leaves the variational term out.
    kind
        What `output` estimates; see :meth:`Tables.noise_of`.

    Notes
    -----
    The variational term trains the variance alone: the noise estimate is detached in it.
    """
    truth = noise if kind == "noise" else tables.signal[step] * noise - tables.noise[step] * clean
    squared = ((truth - output) ** 2).mean(dim=1)
    if likelihood == "none":
        return squared, None
    guess = tables.clean(noisy, tables.noise_of(output.detach(), noisy, step, kind), step)
    mean = tables.posterior_mean(guess, noisy, step)
    log_variance = tables.learned_log_variance(interpolation, step)
    true_mean = tables.posterior_mean(clean, noisy, step)
    divergence = normal_kl(true_mean, tables.log_variance[step], mean, log_variance)
    log_density = discrete_log_likelihood if likelihood == "discrete" else gaussian_log_likelihood
    surprise = -log_density(clean, mean, 0.5 * log_variance)
    bits = torch.where(step[:, None] == 0, surprise, divergence).mean(dim=1) / _LN2
    return squared, bits


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two normal distributions, in nats."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log density of a normal distribution, in nats."""
    return -0.5 * (math.log(2 * math.pi) + 2 * log_scale + (x - mean) ** 2 * torch.exp(-2 * log_scale))


def normal_cdf(x: Tensor) -> Tensor:
    """The published approximation of the standard normal distribution function."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discrete_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around `x`, open beyond ±0.999, in nats.

    Made for the pixels of images. Above 0.999 an estimate that is too high costs nothing.
    """
    offset, inverse = x - mean, torch.exp(-log_scale)
    below_upper = normal_cdf(inverse * (offset + 1.0 / 255.0))
    below_lower = normal_cdf(inverse * (offset - 1.0 / 255.0))
    inside = torch.log((below_upper - below_lower).clamp(min=1e-12))
    low, high = torch.log(below_upper.clamp(min=1e-12)), torch.log((1.0 - below_lower).clamp(min=1e-12))
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inside))


def sample(
    schedule: Schedule,
    predict: Predict,
    start: Tensor,
    draw: Callable[[], Tensor],
    method: Sampler,
) -> Tensor:
    """Clean values from noise, in one pass of the network per step of the schedule.

    Parameters
    ----------
    schedule
        Steps to take, already respaced.
    predict
        The network, called with the values (n, G) and the original time.
    start
        Standard normal noise, (n, G).
    draw
        Gives further noise of the same shape; called once per step by ``"ddpm"``, by no other.
    method
        ``"ddpm"``: ancestral sampling; ``"ddim"``: its deterministic counterpart, of first order; ``"dpm++"``: the
        two-step solver of second order, which needs the fewest steps.
    """
    tables = schedule.tables(start.device)
    step_back = _STEPS[method](schedule, tables, draw)
    x = start
    for step in reversed(range(len(schedule))):
        x = step_back(x, *predict(x, int(schedule.times[step])), step)
    return x


class _Ancestral:
    def __init__(self, schedule: Schedule, tables: Tables, draw: Callable[[], Tensor]) -> None:
        self.tables, self.draw = tables, draw

    def __call__(self, x: Tensor, estimate: Tensor, interpolation: Tensor, step: int) -> Tensor:
        tables = self.tables
        mean = tables.posterior_mean(tables.clean(x, estimate, step), x, step)
        noise = self.draw()  # also at the last step, which adds none: seeded streams then match the published one
        if step == 0:
            return mean
        return mean + torch.exp(0.5 * tables.learned_log_variance(interpolation, step)) * noise


class _Deterministic:
    def __init__(self, schedule: Schedule, tables: Tables, draw: Callable[[], Tensor]) -> None:
        self.tables = tables
        self.signal = np.sqrt(schedule.alphas_cumprod_prev)
        self.noise = np.sqrt(1.0 - schedule.alphas_cumprod_prev)

    def __call__(self, x: Tensor, estimate: Tensor, interpolation: Tensor, step: int) -> Tensor:
        clean = self.tables.clean(x, estimate, step)
        return float(self.signal[step]) * clean + float(self.noise[step]) * estimate


class _TwoStep:
    """DPM-Solver++(2M): the clean estimate is extrapolated from two steps, in log signal-to-noise."""

    def __init__(self, schedule: Schedule, tables: Tables, draw: Callable[[], Tensor]) -> None:
        self.tables = tables
        self.signal = np.sqrt(schedule.alphas_cumprod)
        self.noise = np.sqrt(1.0 - schedule.alphas_cumprod)
        self.log_ratio = np.log(self.signal / self.noise)
        self.before: Tensor | None = None

    def __call__(self, x: Tensor, estimate: Tensor, interpolation: Tensor, step: int) -> Tensor:
        clean = self.tables.clean(x, estimate, step)
        if step == 0:
            return clean
        length = self.log_ratio[step - 1] - self.log_ratio[step]
        ahead = clean
        if self.before is not None:
            ratio = (self.log_ratio[step] - self.log_ratio[step + 1]) / length
            ahead = clean + float(0.5 / ratio) * (clean - self.before)
        self.before = clean
        kept = float(self.noise[step - 1] / self.noise[step])
        return kept * x - float(self.signal[step - 1] * np.expm1(-length)) * ahead


_STEPS: dict[str, type[_Ancestral] | type[_Deterministic] | type[_TwoStep]] = {
    "ddpm": _Ancestral,
    "ddim": _Deterministic,
    "dpm++": _TwoStep,
}
