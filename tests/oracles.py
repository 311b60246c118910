"""Independent one-tensor implementations of published rules, written from the papers' official code in its own order of operations.

Each is ``oracle(params, grads_per_step, **options)`` in fp64; nothing here shares code with the package.
"""

import math

import torch


def diffgrad(p, grads, lr, betas, eps, weight_decay, **_):
    m = v = prev = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g + weight_decay * p
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        friction = torch.sigmoid((prev - g).abs())
        prev = g
        step = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        p = p - step * m * friction / (v.sqrt() + eps)
    return p


def exadam(p, grads, lr, betas, eps, weight_decay, **_):
    b1, b2 = betas
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p = p * (1 - lr * weight_decay)
        m, v = m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)
        bc1, bc2 = 1 - b1**t, 1 - b2**t
        d1 = 1 + v / (v + eps) * b2**t
        d2 = 1 + m**2 / (m**2 + eps) * b1**t
        m_hat, v_hat, g_hat = m / bc1 * d1, v / bc2 * d2, g / bc1 * d1
        p = p - lr * (m_hat + g_hat) / (v_hat.sqrt() + eps)
    return p


def ademamix(p, grads, lr, betas, eps, weight_decay, alpha=2.0, alpha_warmup=None, beta3_warmup=None, **_):
    b1, b2, b3_final = betas
    m1 = m2 = v = torch.zeros_like(p)

    def half(b):
        return math.log(0.5) / math.log(b + 1e-8) - 1

    for t, g in enumerate(grads, 1):
        a = alpha if alpha_warmup is None or t >= alpha_warmup else t / alpha_warmup * alpha
        b3 = b3_final
        if beta3_warmup is not None and t < beta3_warmup:
            x = t / beta3_warmup
            b3 = math.pow(0.5, 1 / ((1 - x) * half(b1) + x * half(b3_final) + 1))
        m1 = b1 * m1 + (1 - b1) * g if b1 else g
        m2, v = b3 * m2 + (1 - b3) * g, b2 * v + (1 - b2) * g * g
        u = (m1 / (1 - b1**t) + a * m2) / (v.sqrt() / math.sqrt(1 - b2**t) + eps)
        p = p - lr * (u + weight_decay * p)
    return p


def adopt(p, grads, lr, betas, eps, weight_decay, decouple=False, clip_lambda="k**0.25", **_):
    m = v = torch.zeros_like(p)
    for k, g in enumerate(grads):
        if weight_decay and not decouple:
            g = g + weight_decay * p
        if k == 0:
            v = g * g
            continue
        if weight_decay and decouple:
            p = p - lr * weight_decay * p
        n = g / v.sqrt().clamp(min=eps)
        if clip_lambda is not None:
            bound = k**0.25
            n = n.clamp(-bound, bound)
        m = torch.lerp(m, n, 1 - betas[0])
        p = p - lr * m
        v = betas[1] * v + (1 - betas[1]) * g * g
    return p


def grams(p, grads, lr, betas, eps, weight_decay, **_):
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p = p - lr * weight_decay * p
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        step = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        p = p - step * torch.sign(g) * (m / (v.sqrt() + eps)).abs()
    return p


def signum(p, grads, lr, momentum, weight_decay, weight_decouple=True, **_):
    m = torch.zeros_like(p)
    for g in grads:
        if weight_decouple:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        m = momentum * m + (1 - momentum) * g if momentum else g
        p = p - lr * torch.sign(m)
    return p


def sophia(p, grads, lr, betas, rho, weight_decay, hessian_grads, every, bs, **_):
    m = h = torch.zeros_like(p)
    for t, g in enumerate(grads):
        if t % every == 0:
            h = betas[1] * h + (1 - betas[1]) * hessian_grads[t] ** 2
        p = p * (1 - lr * weight_decay)
        m = betas[0] * m + (1 - betas[0]) * g
        ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(None, 1)
        p = p - lr * m.sign() * ratio
    return p


def adahessian(p, grads, lr, betas, eps, weight_decay, diagonals, hessian_power=1.0, **_):
    m = h = torch.zeros_like(p)
    for t, (g, d) in enumerate(zip(grads, diagonals, strict=True), 1):
        m, h = betas[0] * m + (1 - betas[0]) * g, betas[1] * h + (1 - betas[1]) * d * d
        denominator = h.sqrt() ** hessian_power / math.sqrt(1 - betas[1] ** t) ** hessian_power + eps
        p = p - lr * (m / (1 - betas[0] ** t) / denominator + weight_decay * p)
    return p


def adabelief(p, grads, lr, betas, eps, weight_decay, amsgrad=False, weight_decouple=True, fixed_decay=False, rectify=True, degenerated_to_sgd=True):
    """Version 0.2.1, with its literal g - m_new."""
    b1, b2 = betas
    m = s = s_max = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if weight_decouple:
            p = p * (1 - (weight_decay if fixed_decay else lr * weight_decay))
        else:
            g = g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        bc1, bc2 = 1 - b1**t, 1 - b2**t
        s_max = torch.maximum(s_max, s) if amsgrad else s
        if not rectify:
            p = p - lr / bc1 * m / (s_max.sqrt() / math.sqrt(bc2) + eps)
            continue
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / bc2
        if rho >= 5:
            r = math.sqrt((rho - 4) / (rho_inf - 4) * (rho - 2) / (rho_inf - 2) * rho_inf / rho)
            p = p - lr * r * math.sqrt(bc2) / bc1 * m / (s.sqrt() + eps)
        elif degenerated_to_sgd:
            p = p - lr / bc1 * m
    return p


def schedule_free(p, grads, lr, betas, eps, weight_decay, warmup_steps=0, r=0.0, weight_lr_power=2.0, **_):
    """Returns y, what the parameter holds in train mode."""
    y, z, v, lr_max, total = p, p, torch.zeros_like(p), -1.0, 0.0
    for k, g in enumerate(grads):
        now = lr * ((k + 1) / warmup_steps if k < warmup_steps else 1.0)
        lr_max = max(now, lr_max)
        weight = (k + 1) ** r * lr_max**weight_lr_power
        total += weight
        c = weight / total if total else 0.0
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = g / ((v / (1 - betas[1] ** (k + 1))).sqrt() + eps) + weight_decay * y
        y, z = torch.lerp(y, z, c) + now * (betas[0] * (1 - c) - 1) * u, z - now * u
    return y
