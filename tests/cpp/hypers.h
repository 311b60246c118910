// Hyper-parameters of three groups that together switch on what the rules have.
#pragma once
#include <vector>

#include "core/table.h"

namespace {

std::vector<fa::Hyper> hypers() {
  fa::Hyper h{};
  h.lr = 3e-3, h.beta1 = 0.87, h.beta2 = 0.98, h.beta3 = 0.995, h.eps = 1e-7, h.sign = 1, h.momentum = 0.85, h.dampening = 0.1;
  h.lr_decay = 0.01, h.mu_base = 0.9998, h.alpha = 4, h.alpha_warmup = h.beta3_warmup = 50, h.half1 = 4, h.half3 = 130, h.rho = 0.04;
  h.power = 1, h.warmup = 10, h.weight_lr_power = 2, h.degenerated = 1;
  fa::Hyper l2 = h, decoupled = h;
  l2.l2 = 0.03, l2.sign = -1, l2.rectify = 1, l2.nesterov = 1;
  decoupled.decoupled = 0.2, decoupled.amsgrad = 1, decoupled.clip = 0.3, decoupled.power = 0.5, decoupled.r = 0.5;
  return {h, l2, decoupled};
}

}  // namespace
