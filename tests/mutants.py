"""One-line breaks of the engine, and the test each must turn red. tests/test_mutation.py applies them to a copy, one at a time.

``old`` must stand in ``file`` exactly once; a text that is gone makes the check fail, so that no mutant goes stale unseen.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    target: str  # a test in tests/mutation_targets.py, or file::test of another file in tests/


RULES, ADAM, NUMBERS, DTYPES = "csrc/core/rules.h", "csrc/core/rules_adam.h", "csrc/core/numbers.h", "csrc/core/dtypes.h"
TRUTH, MID, FUNCTION = "fusedadapt/reference/lowrank.py", "fusedadapt/lowrank/mid.py", "fusedadapt/lowrank/function.py"
FUNCTIONAL, LOWRANK = "fusedadapt/lowrank/functional.py", "fusedadapt/ops/lowrank.py"
LR_FEW = "test_lowrank_cpp.py::test_few_rows_take_adapters_as_they_lie"
LR_HOST, LR_CPU, LR_PARTS = "csrc/cpu/lowrank.cpp", "csrc/cpu/lowrank_isa.cpp", "csrc/cpu/lowrank_parts.h"
PLAIN, LR_BRANCH = "fusedadapt/lowrank/plain.py", "csrc/cpu/lowrank_branch.cpp"
SAVED, SHORT = "test_lowrank_memory.py::test_saved_bytes_without_gradients_of_a", "test_lowrank_plain.py::test_"
DERIVATIVES, CONTRACT = "test_lowrank_derivatives.py::test_derivatives", "test_lowrank_contract.py::test_"
SELECT, MASK, DELTA, CODING = (f"fusedadapt/sparse/{name}.py" for name in ("select", "mask", "delta", "coding"))
LAYERS, SPARSE_TRUTH, SPARSE_OPS = "fusedadapt/sparse/layers.py", "fusedadapt/reference/sparse.py", "fusedadapt/ops/sparse.py"
FAKE_TRUTH, FAKE_PUBLIC, FAKE = "fusedadapt/reference/fake_quant.py", "fusedadapt/quant/fake.py", "test_fake_quant.py::test_"
FAKE_CPU, FAKE_GPU = "csrc/cpu/fake_quant_isa.cpp", "kernels/fake_quant.py"
QUANT_ACT, ACT = "csrc/cpu/quant_act_isa.cpp", "test_quant_act.py::test_"
Q_CODEC, Q_PRODUCT = "csrc/cpu/quant_isa.cpp", "csrc/cpu/quant_product_isa.cpp"
Q_VECTOR, Q_LANES = "csrc/cpu/quant_vector.h", "csrc/cpu/quant_lanes.h"
Q_SAME, Q_EXACT = "test_quant_cpp.py::test_the_codec_is_the_reference", "test_quant_cpp.py::test_products_are_as_exact_as_torch_and_repeat"
SWEEP, HOST, TABLE = "csrc/cpu/optim_isa.cpp", "csrc/cpu/optim.cpp", "csrc/table_host.cpp"
POSITIONS, BY_MASK = "csrc/cpu/compact.cpp", "test_optim_compact.py::test_a_mask_as_the_index_is_a_list[cpp-9001-options0]"
LOWBIT, CODED = "csrc/core/lowbit.h", "test_optim_coded.py::test_same_bits_as_the_reference"

MUTANTS = (
    # rules and numbers in C++
    Mutant(
        RULES, "const float direction = r.beta1 * s[0] + r.alpha1 * g;",
        "const float direction = r.beta1 * s[0] + r.alpha2 * g;", "test_cpp[Lion]",
    ),
    Mutant(RULES, "r.alpha1 = c.step == 1.0 ? 1.f : float(1.0 - h.dampening);", "r.alpha1 = float(1.0 - h.dampening);", "test_cpp[SGD]"),
    Mutant(RULES, "q = q < 0.f ? 0.f : q;", "q = q < 0.f ? -q : q;", "test_a_negative_variance_counts_as_zero[cpp]"),
    Mutant(RULES, "(ratio > 1.f ? 1.f : ratio)", "(ratio > 1.f ? ratio : 1.f)", "test_cpp[SophiaG]"),
    Mutant(RULES, "r.mix * (s[0] - p)", "r.mix * (p - s[0])", "test_cpp[ScheduleFreeAdamW]"),
    Mutant(ADAM, "(1.0 - product * mu_next)", "(1.0 - product)", "test_cpp[NAdam]"),
    Mutant(ADAM, "r.alpha2 * surprise * surprise + r.eps_state;", "r.alpha2 * surprise * surprise;", "test_cpp[AdaBelief]"),
    Mutant(ADAM, "if (first) r.decay = 1.f, r.pull = 0.f;", "", "test_cpp[ADOPT]"),
    Mutant(ADAM, "r.mode = rho > 5.0 ? kAdaptive : kMomentumStep;", "r.mode = kAdaptive;", "test_cpp[RAdam]"),
    Mutant(NUMBERS, "if (k & 1) out *= b;", "if (k & 2) out *= b;", "test_cpp[AdamW]"),
    Mutant(NUMBERS, "h.lr * h.decoupled - h.fixed", "h.lr * h.decoupled", "test_cpp[AdaBelief]"),
    Mutant(NUMBERS, "float(x > 0.f) - float(x < 0.f)", "float(x > 0.f) - float(x <= 0.f)", "test_cpp[Signum]"),
    # storage, random bits and the sweep in C++
    Mutant(DTYPES, "u + 0x7fffu + ((u >> 16) & 1u)", "u + 0x8000u", "test_bf16_ties_go_to_even[cpp]"),
    Mutant(DTYPES, "(u + 0x8000u) >> 16", "u >> 16", "test_split_master_is_the_fp32_run[cpp]"),
    Mutant("csrc/core/philox.h", "c3 = uint32_t(a);", "c3 = uint32_t(b);", "test_philox"),
    Mutant(SWEEP, "(word >> j & 1u)", "(word >> (j & 15) & 1u)", "test_frozen_elements_beside_fp32_states_stay"),
    Mutant(SWEEP, "word << (31 - i)", "word << (31 - (i & 15))", "test_frozen_elements_stay[cpp]"),
    Mutant(
        SWEEP, "buffer[i] = g[i] / scale * factor * sign + l2 * p[i];",
        "buffer[i] = (g[i] / scale * factor + l2 * p[i]) * sign;", "test_cpp[SGD]",
    ),
    Mutant(SWEEP, "c3[b] = uint32_t(x);", "c3[b] = uint32_t(y);", "test_cpp[Lion]"),
    Mutant(HOST, "k.second.step == before.step && ", "", "test_groups_keep_their_own_rows"),
    Mutant(HOST, "k.first == t.group && ", "", "test_groups_keep_their_own_rows"),
    # the table
    Mutant(TABLE, " || (!e.compact_grad && !same_order(e.p, e.g))", "", "test_a_gradient_in_another_memory_order"),
    Mutant(TABLE, "negated(given) || ", "", "test_table_reading.py::test_a_gradient_stored_as_its_negative_is_read_right[dlpack-flips0-shape0]"),
    Mutant(TABLE, 'if (!e.compact_grad && !same_shape(e.p, e.g)) fail("shape:grad");', "", "test_a_wrong_gradient_is_refused"),
    Mutant("csrc/table_warm.cpp", "!(p == w.p)", "p.signature != w.p.signature", "test_a_moved_parameter_is_found"),
    # the mask as the index
    Mutant(POSITIONS, "passed_ = 0;", "", BY_MASK),
    Mutant(POSITIONS, "const int64_t base = 64 *", "const int64_t base = 32 *", BY_MASK),
    Mutant("csrc/cpu/positions_isa.cpp", "base += 8)", "base += 4)", BY_MASK),
    # coded states
    Mutant(LOWBIT, "const int32_t m = a > 0.f ? int32_t(y) : 0;", "const int32_t m = a > 0.f ? int32_t(y + 0.5f) : 0;", f"{CODED}[AdamW-0-int8]"),
    Mutant(LOWBIT, "d.offset[0] = has_sign ? 0.f : 2.f;", "d.offset[0] = has_sign ? 0.f : 1.f;", f"{CODED}[AdamW-0-int8]"),
    Mutant(LOWBIT, "(u + 0x7ffffu + ((u >> 20) & 1u)) >> 20", "(u + 0x80000u) >> 20", f"{CODED}[AdamW-0-fp8]"),
    Mutant(
        "csrc/cpu/lowbit.cpp", "if (!mask_ || any_trainable(mask_, at, count)) codec_", "codec_",
        "test_optim_coded.py::test_a_block_without_trainable_elements_is_left_alone",
    ),
    Mutant(
        "fusedadapt/reference/lowbit.py", "torch.where(a > 0, m - 1, 0)", "torch.where(m > 2, m - 1, 0)",
        "test_optim_coded.py::test_error_is_half_a_code_step",
    ),
    # the reference
    Mutant(
        "fusedadapt/reference/rules_adam.py", "r.step_size, r.eps = h.lr * root2 / bc1, h.eps * root2\n",
        "r.step_size, r.eps = h.lr * root2 / bc1, h.eps\n", "test_as_torch[AdamW]",
    ),
    Mutant("fusedadapt/reference/optim.py", "g = g + row.l2 * (p if", "g = g - row.l2 * (p if", "test_as_torch[SGD]"),
    Mutant(
        "fusedadapt/reference/rules.py", "out = where(n % 2 == 1, out * b, out)",
        "out = where(n % 2 == 0, out * b, out)", "test_as_torch[Adam]",
    ),
    Mutant(
        "fusedadapt/reference/optim.py", "torch.where(x.isnan(), u >> 16 | 0x40, (u + 0x8000) >> 16)",
        "torch.where(x.isnan(), u >> 16 | 0x40, u >> 16)", "test_split_master_is_the_fp32_run[reference]",
    ),
    # Triton
    Mutant("kernels/optim_rules.py", "sign_of(direction), row[BETA2] * s0", "sign_of(direction), row[BETA1] * s0", "test_triton[Lion]"),
    Mutant("kernels/optim_rules.py", "surprise = row[BETA1] * (g - s0)", "surprise = g - s0", "test_triton[AdaBelief]"),
    Mutant("kernels/common.py", "(u + 0x7FFF + ((u >> 16) & 1)) >> 16)", "(u + 0x8000) >> 16)", "test_bf16_ties_go_to_even[triton]"),
    Mutant("kernels/common.py", "return (bits & 1) != 0", "return (bits & 2) != 0", "test_frozen_elements_stay[triton]"),
    Mutant("kernels/optim.py", "g = g * clip * row[SIGN]", "g = g * row[SIGN]", "test_triton[AdamW]"),
    # the optimizers' Python
    Mutant("fusedadapt/optim/options.py", "1.0 if factor > 1.0 else factor", "factor", "test_clips_as_torch"),
    Mutant(
        "fusedadapt/optim/base.py", "stale |= self._getter(group) != known or (",
        "stale |= not known or (", "test_a_changed_learning_rate_counts",
    ),
    Mutant(
        "fusedadapt/optim/plans_device.py", "after = torch.where(scalars.found_inf != 0, clocks, after)",
        "pass", "test_a_skipped_step_does_not_count[triton]",
    ),
    Mutant(
        "fusedadapt/optim/first_order.py", '"decoupled": decay if decoupled else 0.0',
        '"decoupled": 0.0 if decoupled else decay', "test_as_torch[AdamW]",
    ),
    Mutant(
        "fusedadapt/optim/state.py", "out[p] = pack_mask(local(mask), local(p.detach()))",
        "out[p] = pack_mask(~local(mask), local(p.detach()))", "test_frozen_elements_stay[cpp]",
    ),
    Mutant("fusedadapt/optim/adam.py", '0.96 ** group["momentum_decay"]', '0.9 ** group["momentum_decay"]', "test_as_torch[NAdam]"),
    Mutant("fusedadapt/optim/release.py", "        p.grad = None\n", "", "test_released_gradients_are_freed"),
    # low-rank: the reference and the middle
    Mutant(TRUTH, ">= threshold).to(device)", "> threshold).to(device)", f"{CONTRACT}the_edge_of_a_mask[reference]"),
    Mutant(
        TRUTH, "& 0xFFFFFFFFFFFFFFFF, element, stream, 0)", "& 0xFFFFFFFFFFFFFFFF, element, 0, 0)",
        f"{CONTRACT}masks_are_the_same_bits_everywhere[cpp-5-13]",
    ),
    Mutant(TRUTH, "torch.where(keep, x * (65536 / (65536 - threshold)), 0)", "torch.where(keep, x, 0)", f"{DERIVATIVES}[dropout]"),
    Mutant(TRUTH, "@ a[r].to(total.dtype), seed, t, i)", "@ a[r].to(total.dtype), seed, t, 0)", f"{DERIVATIVES}_of_a_group"),
    Mutant(TRUTH, "        d = d * row_scale.to(d.dtype)\n", "", f"{DERIVATIVES}[row scale]"),
    Mutant(MID, "d_token = (d * active).sum(1)", "d_token = (dv * active).sum(1)", f"{DERIVATIVES}[everything]"),
    Mutant(MID, "d_rank = (d * u).sum(0)", "d_rank = (d * gated).sum(0)", f"{DERIVATIVES}[rank gate]"),
    Mutant(MID, "aten.gelu_backward(d, u, approximate=\"tanh\")", "aten.gelu_backward(d, u)", f"{DERIVATIVES}[gelu_tanh]"),
    Mutant(MID, "== 1.0 else v * mid.scaling", "== 1.0 else v", f"{DERIVATIVES}[everything]"),
    # low-rank: the autograd function, its checks, the ops
    Mutant(FUNCTION, "x if needs_x else None, col_scale", "x, col_scale", f"{SAVED}[reference]"),
    Mutant(PLAIN, "_rows(x) if want_a else None", "_rows(x)", f"{SAVED}[cpp]"),
    Mutant(PLAIN, "not key or weight.requires_grad", "not key", f"{SHORT}one_gradient_alone[weight]"),
    Mutant(PLAIN, "found is None or found.asked != asked()", "found is None", "test_lowrank_known.py::test_who_asks_for_a_backend_gets_it"),
    Mutant(
        "csrc/bindings_lowrank.cpp", "read && look.signature", "false && look.signature",
        "test_lowrank_known.py::test_saved_tensor_hooks_may_bring_back_other_memory",
    ),
    Mutant(FUNCTION, "is not None and output.scale_bias else db", "is not None else db", f"{DERIVATIVES}[row scale and bias]"),
    Mutant(FUNCTION, "upstream = into_x or any(", "upstream = True or any(", f"{CONTRACT}only_what_is_needed_is_computed"),
    Mutant(FUNCTION, "    @first_order(", "    # (", "test_derivatives.py::test_second_derivatives_are_refused[gated-constant]"),
    Mutant(PLAIN, "    @first_order(", "    # (", "test_derivatives.py::test_second_derivatives_are_refused[lora-constant]"),
    Mutant(
        FUNCTION, "known.new_zeros(known.shape[0], w) if d is None", "known if d is None",
        "test_lowrank_derivatives.py::test_partly_frozen_groups[one of two A]",
    ),
    Mutant(FUNCTION, "(dx, None, None, None, x, False)", "(dx, None, None, None, xs, False)", f"{DERIVATIVES}[col scale]"),
    Mutant(FUNCTIONAL, "return s.dropout_p if training else 0.0", "return s.dropout_p", f"{CONTRACT}seeds[reference]"),
    Mutant(FUNCTIONAL, "gate.to(scale.dtype) * scale", "gate", f"{DERIVATIVES}[trained scaling]"),
    Mutant(LOWRANK, "torch.autograd.graph.increment_version(y)", "pass", f"{CONTRACT}in_place_ops_are_seen_by_autograd[cpp]"),
    Mutant(LOWRANK, "x.stride(1) == 1 and (", "(", "test_lowrank_cpp"),
    Mutant(LOWRANK, "b, _dense(row_scale), y0, need_bias", "b, row_scale, y0, need_bias", "test_lowrank_triton[100001]"),
    # low-rank: C++ and Triton
    Mutant("csrc/cpu/lowrank_few_isa.cpp", "i < kLanes - left ? 0 : -1", "-1", f"{LR_FEW}[base-dtype0]"),
    Mutant(LR_HOST, "&& !s.threshold && !out.back().threshold", "&& !s.threshold", "test_lowrank_cpp"),
    Mutant(LR_HOST, "seed != drawn.seed || ", "", "test_lowrank_cpp.py::test_masks_are_drawn_once_for_both_uses[base]"),
    Mutant(LR_BRANCH, "scale_rows(dv, rank, s, t0", "scale_rows(dv, rank, 1.f, t0", f"{SHORT}bits_are_those_of_the_general_way"),
    Mutant(LR_PARTS, "(at, left) * splat(scale)", "(at, left)", f"{CONTRACT}masks_are_the_same_bits_everywhere[cpp-5-13]"),
    Mutant(LR_CPU, "sums[i] = add ? sums[i] + total : total;", "sums[i] = total;", f"{CONTRACT}skinny_w[cpp]"),
    Mutant(LR_CPU, "if (w.bias) f += ", "if (w.bias) f -= ", "test_lowrank_cpp"),
    Mutant(LR_CPU, "? double(w.row_scale[t]) : 1.0", "? double(w.row_scale[0]) : 1.0", "test_lowrank_in_place"),
    Mutant("kernels/lowrank_parts.py", ".to(tl.int32) >= threshold", ".to(tl.int32) > threshold", f"{CONTRACT}the_edge_of_a_mask[triton]"),
    Mutant("kernels/lowrank_shrink.py", "u = u * kept_scale(h[i])", "u = u", f"{CONTRACT}masks_are_the_same_bits_everywhere[triton-5-13]"),
    Mutant("kernels/lowrank_grads.py", "mb = mb * factor[:, None]", "mb = mb", "test_lowrank_triton[100001]"),
    # sparse: selection, masks, deltas, layers
    Mutant(
        SPARSE_TRUTH, "torch.cumsum(same, 0) <= equal", "torch.cumsum(same, 0) < equal",
        "test_sparse_select.py::test_one_tensor[reference-equal-torch.float32]",
    ),
    Mutant(
        SPARSE_TRUTH, "TOP if nan == \"highest\" else 0, key)", "TOP, key)",
        "test_sparse_select.py::test_one_tensor[reference-special-torch.bfloat16]",
    ),
    Mutant(
        SELECT, "key = TOP if key == TOP >> shifts[-1][0] else key << shifts[-1][0]", "key = key << shifts[-1][0]",
        "test_sparse_select.py::test_threshold_says_where_it_cuts[reference-torch.bfloat16]",
    ),
    Mutant(SPARSE_OPS, "x if x.dtype in DTYPES else x.float()", "x", "test_sparse_select.py::test_strides_offsets_and_other_dtypes[cpp]"),
    Mutant(SELECT, "[: len(items)]", "", "test_sparse_distributed.py::test_two_processes"),
    Mutant(SELECT, "return (keep - before).clamp(min=0)", "return keep", "test_sparse_distributed.py::test_two_processes"),
    Mutant(MASK, "self ^ Mask.full(self.shape, True, self.device)", "Mask(~self.words, self.shape)", "test_sparse_mask.py::test_algebra"),
    Mutant(
        DELTA, "for w, name, old in reversed(self._undo)]", "for w, name, old in self._undo[1:]]",
        "test_sparse_delta.py::test_apply_and_revert_to_the_bit",
    ),
    Mutant(DELTA, "bool((e.indices[1:] > e.indices[:-1]).all())", "True", "test_sparse_delta.py::test_positions_must_fit"),
    Mutant(
        "fusedadapt/files.py",
        "crc = zlib.crc32(tensor_bytes(tensor), crc)",
        "pass",
        "test_sparse_delta_files.py::test_damaged_files_are_refused",
    ),
    Mutant(
        CODING, "s * len(gaps) + int(", "int(",
        "test_sparse_delta_files.py::test_positions_of_every_kind_come_back",
    ),
    Mutant(
        LAYERS, "                return\n        self._write()", "                return",
        "test_sparse_layers.py::test_training_moves_the_chosen_elements_alone",
    ),
    Mutant(LAYERS, "dv if ctx.alpha == 1.0 else dv * ctx.alpha", "dv", "test_sparse_layers.py::test_gradcheck_with_alpha"),
    # quant: fake quantization
    Mutant(FAKE_TRUTH, "(v.low <= v.u.round()) & (v.u.round() <= v.high)", "(v.low <= v.u) & (v.u <= v.high)", f"{FAKE}masks_on_the_half_step_band"),
    Mutant(FAKE_TRUTH, "scale.abs() < TINY", "scale.abs() < 0", f"{FAKE}special_values[reference]"),
    Mutant(FAKE_PUBLIC, "grad(-rule[0] * outside, zero)", "grad(rule[0] * outside, zero)", f"{FAKE}a_zero_point_is_an_offset_in_steps"),
    Mutant(FAKE_PUBLIC, "sizes[-1] = groups.last", "pass", f"{FAKE}lsq_factor_counts_the_elements_of_each_scale[reference]"),
    Mutant(FAKE_CPU, "== out.high ? above : next_down(above)", "== out.high ? above : above", f"{FAKE}masks_on_the_half_step_band"),
    Mutant(FAKE_CPU, "scale[i] = outside[i] = 0.f;", ";", f"{FAKE}cpp_is_the_reference[8-dtype8-False]"),
    Mutant("csrc/cpu/fake_quant.cpp", "last), r % job.groups", "last), 0", f"{FAKE}cpp_is_the_reference[13-dtype13-False]"),
    Mutant(
        FAKE_GPU, "by_scale += tl.where(valid, term, 0.0)", "by_scale = tl.where(valid, term, 0.0)",
        "test_triton_fake_quant.py::test_unaligned_x_and_more_than_one_program",
    ),
    Mutant(
        FAKE_GPU, "clamped(u, low - 1.0, high + 1.0)", "clamped(u, low, high)",
        "test_triton_fake_quant.py::test_triton_is_the_reference[4-dtype4]",
    ),
    # products with quantized activations
    Mutant(QUANT_ACT, "as_float(bits) < kTiny ? 0.f : as_float(bits)", "as_float(bits)", f"{ACT}hostile_rows[base-int8]"),
    Mutant(QUANT_ACT, "totals[i] += float(sums[i]);", "totals[i] = float(sums[i]);", f"{ACT}sums_are_exact_at_their_largest[base]"),
    Mutant(QUANT_ACT, "(row[i] * p.w_scale[n0 + i]) * p.x_scale[t]", "row[i] * (p.w_scale[n0 + i] * p.x_scale[t])", f"{ACT}int8_bits[base-row]"),
    Mutant("fusedadapt/reference/quant_act.py", "total += exact.float()", "total = exact.float()", f"{ACT}int8_bits[base-row]"),
    Mutant(
        "fusedadapt/ops/quant_act.py", "if weight.block == _TILE else activations",
        "if False else activations", f"{ACT}close_to_fp64[fp8_e4m3-block-fp8_e4m3,block=1x128-dtype0]",
    ),
    Mutant("kernels/quant_act.py", "most + 0x7FFFF + ((most >> 20) & 1)", "most + 0x80000", "test_triton_quant_act.py::test_hostile_codes[fp8_e4m3]"),
    Mutant("kernels/quant_act_linear.py", "% CHUNK == 0:", "% CHUNK == 1:", "test_triton_quant_act.py::test_sums_beyond_a_chunk"),
    # four-bit weights beside fp8: the table's second half, the step's exponent, the cap on steps, the published rule
    Mutant(
        "kernels/quant_act_linear.py", "add.u32 many, $3, 0x1C181410;", "add.u32 many, $3, 0x1C181010;",
        "test_triton_quant_act.py::test_the_packed_decoder",
    ),
    Mutant("kernels/quant_act_linear.py", "- 8 * (127 - 12)", "- 8 * (127 - 11)", "test_triton_quant_act.py::test_codes_of_four_bits_are_exact"),
    Mutant(
        "fusedadapt/reference/quant_rules.py", "d.clamp(0, MOST_STEPS)", "d.clamp(0, 99)",
        "test_quant_bytes.py::test_bytes_worked_out_by_hand[fp4_e2m1 {'group_size': 32} 130]",
    ),
    Mutant(
        "csrc/cpu/quant_product.cpp", "numbers.decoded = true;", "return;",
        "test_quant_cpp.py::test_infinities_are_where_the_reference_has_them[base-int4]",
    ),
    # few tokens the short way: whose gradients it must leave alone, and what it must not read
    Mutant(
        "fusedadapt/quant/plain.py", 'return getattr(x, "requires_grad", False) or', "return",
        "test_quant_plain.py::test_who_looks_on_or_wants_gradients_gets_the_general_way",
    ),
    Mutant(
        "fusedadapt/quant/plain.py", "or t.numel() != size[0]", "",
        "test_quant_plain.py::test_parts_that_do_not_fit_are_refused_as_before",
    ),
    Mutant("csrc/looks.cpp", "now.data == look_.data && ", "", "test_quant_known.py::test_a_weight_that_moves_or_changes[scale]"),
    Mutant("csrc/bindings_quant.cpp", "x.signature != c.x.signature || ", "", "test_quant_known.py::test_another_x[columns apart]"),
    Mutant("fusedadapt/quant/plain.py", "and asked() == known.asked", "", "test_quant_known.py::test_who_asks_for_a_backend_gets_it"),
    Mutant(
        "fusedadapt/ops/quant_cpp.py", "return _kept.free.pop()", "return _kept.free[-1]",
        "test_quant_plain.py::test_a_product_within_another_has_memory_of_its_own",
    ),
    # low-bit weights in C++
    Mutant(Q_CODEC, "count -= I(m > cuts[k]);", "count -= I(m >= cuts[k]);", f"{Q_SAME}[base-mxfp4]"),
    Mutant(Q_CODEC, "if (e.round_last) v += z;", "", f"{Q_SAME}[base-hqq4]"),
    Mutant(Q_CODEC, "(x < r.lo) | nan ? x", "(x < r.lo) ? x", f"{Q_SAME}[base-int8]"),
    Mutant(Q_VECTOR, "next = side - c0 % side;", "next = side;", f"{Q_SAME}[base-int4 20]"),
    Mutant(Q_VECTOR, "s.above[(first + i) / s.block], s.offset", "s.above[i / s.block], s.offset", f"{Q_SAME}[base-nf4 nested]"),
    Mutant(Q_LANES, "eight<3>(p + 6)", "eight<3>(p + 5)", f"{Q_EXACT}[base-int3]"),
    Mutant(Q_LANES, "from % side * apart / side", "0", f"{Q_EXACT}[base-nf4]"),
    Mutant(Q_LANES, "return from - start;", "return 0;", f"{Q_EXACT}[base-nf4]"),
    Mutant(Q_LANES, "int(a.per) + (j ^ swap)", "int(a.per) + j", f"{Q_EXACT}[base-nf4]"),
    Mutant(Q_PRODUCT, "% 2 ? v * splat(0.0625f) : v", "% 2 ? v : v", f"{Q_EXACT}[base-int4]"),
    Mutant("csrc/cpu/quant_dot.h", "(v[r][i] - z[r]) * s[r]", "v[r][i] * s[r]", f"{Q_EXACT}[base-int4 other zero]"),
    Mutant(Q_PRODUCT, "largest >= kHuge ?", "false ?", "test_quant_cpp.py::test_sums_of_codes_do_not_overflow[base-int4]"),
    Mutant("csrc/cpu/float8.h", "((magnitude >> kDropped) & 1)", "1", "test_quant_cpp.py::test_every_code_and_tie[base-fp8_e4m3]"),
    Mutant("csrc/cpu/quant.cpp", "as_float(passed(near))", "as_float(passed(far))", "test_quant_cpp.py::test_every_code_and_tie[base-dynamic8]"),
    Mutant(Q_PRODUCT, "sum += load<F>(sums + slot * step + c + i);", "sum = load<F>(sums + slot * step + c + i);", f"{Q_EXACT}[base-int4]"),
)  # fmt: skip
