"""What merging should give, written from the papers in numpy fp64 over flat arrays; the random bits are the library's, the rest is not."""

from __future__ import annotations

import numpy as np

from fusedadapt.reference.random import random16


def bits(seed: int, n: int, model: int, stream: int) -> np.ndarray:
    return random16(seed, np.arange(n, dtype=np.uint64), model, stream).numpy()


def largest(d: np.ndarray, k: int) -> np.ndarray:
    """The k largest magnitudes, equal ones from the front."""
    keep = np.zeros(d.size, bool)
    keep[np.argsort(-np.abs(d), kind="stable")[:k]] = True
    return keep


def ties_paper(deltas: list[np.ndarray], density: list[float], weights: list[float]) -> np.ndarray:
    """Yadav et al. over whole models (each delta: the flattened model)."""
    trimmed = []
    for d, share in zip(deltas, density):
        k = min(int(share * d.size) + 1, d.size)
        cut = np.sort(np.abs(d))[d.size - k]
        trimmed.append(np.where(np.abs(d) >= cut, d, 0))
    return elect_paper(trimmed, weights)


def elect_paper(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
    stack = np.stack(deltas)
    sign = np.sign(stack.sum(0))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    agree = np.where(sign > 0, stack > 0, stack < 0)
    scaled = stack * np.array(weights)[:, None] * agree
    return scaled.sum(0) / np.maximum(agree.sum(0), 1)


def sum_of(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return sum(w * d for w, d in zip(weights, deltas))


def breadcrumbs(d: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Davari and Belilovsky, one row: without the gamma n largest and without the smallest."""
    n = d.size
    target, top = int(density * n), int(gamma * n)
    bottom = max(0, n - target - top)
    order = np.argsort(-np.abs(d), kind="stable")[::-1]
    keep = np.zeros(n, bool)
    keep[order[bottom : bottom + target]] = True
    return np.where(keep, d, 0)


def della_chances(d: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """MagPrune, one row: chances to stay, from density - epsilon for the smallest change to density + epsilon."""
    rank = np.argsort(np.argsort(np.abs(d), kind="stable"), kind="stable")
    if d.size == 1:
        return np.full(1, density)
    return density - epsilon + 2 * epsilon * rank / (d.size - 1)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def pcb(deltas: list[np.ndarray], ratio: float, weights: list[float]) -> np.ndarray:
    """Du et al.: whole flattened models."""
    n, total = len(deltas), deltas[0].size
    edge = int(1e-4 * total)
    clamped = []
    for d in deltas:
        size = np.sort(np.abs(d))
        clamped.append(np.sign(d) * np.clip(np.abs(d), size[edge], size[total - edge - 1]))
    everything = sum(clamped)
    scales = []
    for d in clamped:
        size = np.abs(d)
        intra = np.exp(n * ((size - size.min()) / (size.max() - size.min())) ** 2)
        score = intra * np.tanh(d * everything)
        cut = np.sort(score)[total - max(round(ratio * total), 1)]
        scales.append((np.maximum(score, cut) - cut) / (score.max() - cut))
    top = sum(s * d * w for s, d, w in zip(scales, clamped, weights))
    return top / np.maximum(sum(scales), 1e-12)
