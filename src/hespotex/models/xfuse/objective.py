"""The joint model and its evidence lower bound, one draw at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .baselines import Baselines, Start
from .likelihood import nb_log_prob, normal_log_ratio, total_counts
from .metagenes import Metagenes
from .network import Network
from .slides import Patch

__all__ = ["Drawn", "Generative", "Noise"]


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard normal numbers behind one draw of everything that is random.

    Attributes
    ----------
    z
        For each level, as the latent field.
    profiles
        For each metagene in use, (K, G).
    effects
        For each section in the batch, (2, G): on ρ and on λ.
    """

    z: list[Tensor]
    profiles: Tensor
    effects: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class Drawn:
    """One draw, and the terms of the bound that no metagene changes.

    Attributes
    ----------
    scale, logits
        Of each pixel: scale (B, 1, h, w), and metagene activity before the softmax (B, K, h, w).
    profiles
        Log effects of the metagenes, (K, G).
    profile_terms
        log p − log q of each metagene, weighted, (K,).
    effects
        Effects of each section on ρ and λ.
    image, latent, effect
        log p(image); log p − log q of the latent fields, and of the effects, weighted.
    """

    scale: Tensor
    logits: Tensor
    profiles: Tensor
    profile_terms: Tensor
    effects: Mapping[int, Tensor]
    image: Tensor
    latent: Tensor
    effect: Tensor

    def rest(self) -> Tensor:
        """Sum of the terms that no metagene changes."""
        return self.image + self.latent + self.effect


class Generative(nn.Module):
    """Network, baselines and metagenes.

    Parameters
    ----------
    network, metagenes
        See there.
    start, n_levels
        See :class:`Baselines`.
    """

    def __init__(self, network: Network, metagenes: Metagenes, start: Start, n_levels: int) -> None:
        super().__init__()
        self.network, self.metagenes = network, metagenes
        self.baselines = Baselines(start, n_levels)

    def noise(self, patches: Sequence[Patch]) -> Noise:
        """Fresh noise for a draw on these patches, from the global generator."""
        image, genes = patches[0].image, self.baselines.n_genes
        size, fields = list(image.shape[-2:]), []
        for channels in self.network.channels:
            fields.append(torch.randn(len(patches), channels, *size, device=image.device))
            size = [-(-n // 2) for n in size]
        levels = sorted({patch.level for patch in patches if patch.level < self.baselines.n_levels})
        return Noise(
            fields,
            torch.randn(len(self.metagenes.slots), genes, device=image.device),
            {level: torch.randn(2, genes, device=image.device) for level in levels},
        )

    def draw(self, patches: Sequence[Patch], noise: Noise, sizes: Sequence[int]) -> Drawn:
        """Encode, draw, decode.

        Parameters
        ----------
        patches
            The batch.
        noise
            What the draw is made of.
        sizes
            Number of patches of each section in an epoch; their sum is that of the data set.
        """
        image = torch.stack([patch.image for patch in patches])
        posterior = self.network.encode(image)
        z = [mean + sd * eps for (mean, sd), eps in zip(posterior, noise.z, strict=True)]
        latent = torch.stack(
            [normal_log_ratio(eps, mean, sd).sum() for (mean, sd), eps in zip(posterior, noise.z, strict=True)]
        ).sum()
        d = self.network.decode(z)
        mu, sigma = self.network.image(d)
        pixels = torch.distributions.Normal(mu, sigma, validate_args=False).log_prob(image).sum()
        profile_mean, profile_sd = self.metagenes.profiles()
        terms = normal_log_ratio(noise.profiles, profile_mean, profile_sd, self.baselines.tau()).sum(dim=1)
        effects, effect = {}, image.new_zeros(())
        for level, eps in noise.effects.items():
            centre, width = self.baselines.effects(level)
            effects[level] = centre + width * eps
            weight = sum(patch.level == level for patch in patches) / sizes[level]
            effect = effect + weight * normal_log_ratio(eps, centre, width, self.baselines.effect_width()).sum()
        return Drawn(
            scale=self.network.scale(d),
            logits=self.metagenes.logits(self.network.activity_features(d)),
            profiles=profile_mean + profile_sd * noise.profiles,
            profile_terms=len(patches) / sum(sizes) * terms,
            effects=effects,
            image=pixels,
            latent=latent,
            effect=effect,
        )

    def counts_term(self, patches: Sequence[Patch], drawn: Drawn, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log p of the counts, and the sum over labels of the root mean square error over genes.

        Parameters
        ----------
        patches
            The batch.
        drawn
            The draw.
        kept
            Metagenes that take part, indices; all by default.
        """
        logits = drawn.logits if kept is None else drawn.logits[:, kept]
        profiles = drawn.profiles if kept is None else drawn.profiles[kept]
        weighted = drawn.scale * torch.softmax(logits, dim=1)
        total, error = weighted.new_zeros(()), weighted.new_zeros(())
        for index, patch in enumerate(patches):
            pooled = patch.bags.sum(weighted[index].flatten(1).T[patch.bags.part])
            log_rates, count_logits = self.rates(profiles, drawn.effects.get(patch.level))
            size = total_counts(pooled, log_rates)
            known = patch.measured
            total = total + torch.where(known, nb_log_prob(patch.counts, size, count_logits), 0.0).sum()
            with torch.no_grad():
                off = torch.where(known, patch.counts - size * count_logits.exp(), 0.0)
                error = error + off.square().mean(dim=1).sqrt().sum()
        return total, error

    def rates(self, profiles: Tensor, effects: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log rate of each gene in each metagene, (K, G), and logits, (G,), in a section with these effects."""
        if effects is None:
            return self.baselines.rho + profiles, self.baselines.logits
        return self.baselines.rho + effects[0] + profiles, self.baselines.logits + effects[1]

    def bound(
        self, patches: Sequence[Patch], noise: Noise, sizes: Sequence[int], *, prior_weight: float = 1.0
    ) -> dict[str, Tensor]:
        """The bound (``"elbo"``), its terms, and the mean over spots of the root mean square error over genes (``"rmse"``).

        Parameters
        ----------
        patches, noise, sizes
            As for :meth:`draw`.
        prior_weight
            Weight of all that holds draws to their priors; the bound is one at 1.
        """
        drawn = self.draw(patches, noise, sizes)
        counts, error = self.counts_term(patches, drawn)
        spots = max(1, sum(patch.bags.n for patch in patches))
        prior = drawn.latent + drawn.effect + drawn.profile_terms.sum()
        elbo = counts + drawn.image + prior_weight * prior
        return {
            "elbo": elbo,
            "counts": counts,
            "image": drawn.image,
            "latent": drawn.latent,
            "rmse": error / spots,
        }

    def bound_without_each(self, patches: Sequence[Patch], noise: Noise, sizes: Sequence[int]) -> Tensor:
        """The bound with all metagenes, then without each, (1 + K,) float64 on the CPU: decoder output and draw are shared.

        What no metagene changes grows with the pixels, and would round off the differences in single precision.
        """
        drawn = self.draw(patches, noise, sizes)
        count = len(drawn.profiles)
        everything = torch.arange(count, device=drawn.scale.device)
        choices = [everything] + (
            [everything[everything != left_out] for left_out in range(count)] if count > 1 else []
        )
        changed = torch.stack(
            [self.counts_term(patches, drawn, kept)[0] + drawn.profile_terms[kept].sum() for kept in choices]
        )
        return changed.cpu().double() + drawn.rest().cpu().double()
