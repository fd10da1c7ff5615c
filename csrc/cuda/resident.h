// Whole tasks by one block each: single passes, K inner steps, and the walk back over them.
//
//   adapt     θ_{k+1} = θ_k − α_k ⊙ u_k, losses[k] = L_k(θ_k)
//   maml      the same, then λ_K = ∇L_query(θ_K) / T (plain kernel); then
//             λ_k = λ_{k+1} + H_k ḡ_k (+ ω ḡ_k), ā_k = −λ_{k+1} ⊙ u_k (dual kernel)
//
// One launch runs all steps of all tasks; the operands stay in shared memory for a pass, θ, the
// rule's states and λ are float32 in device memory, which is read and written once a step by the
// block that owns the task: 8 bytes a parameter and step against 24 multiply-adds a parameter and
// 64 points. Sums over tasks are a small second kernel, in the order of the tasks.
#pragma once

#include "../math/rules.h"
#include "tile.h"

namespace fastmeta {

// Where a task's arrays lie in the room that the caller gives, in floats; size is that of a task.
struct Room {
  int64_t thetas, states, updates, lambda, direction, adjoints, rates, size;
};

FM_HOST_DEVICE int64_t count_parameters(const Network& n) {
  return n.width * (n.in + 1) + (n.depth - 2) * n.width * (n.width + 1) + n.out * (n.width + 1);
}

FM_HOST_DEVICE int states_of(const Rule& rule) {
  return rule.kind == RuleKind::k_adam ? 2 : rule.kind == RuleKind::k_momentum ? 1 : 0;
}

FM_HOST_DEVICE Room room_of(const Job& job) {
  const int64_t P = count_parameters(job.net), K = job.steps, states = states_of(job.rule);
  const bool meta = job.op == Op::k_maml, loops = meta || job.op == Op::k_adapt,
             walks = meta && job.order == 2;
  Room r = {};
  const auto take = [&](int64_t count) {
    const int64_t from = r.size;
    r.size += count;
    return from;
  };
  r.thetas = take(walks ? (K + 1) * P : meta ? P : 0);
  r.states = take(loops ? states * P * (walks && job.rule.kind == RuleKind::k_adam ? K : 1) : 0);
  r.updates = take(meta && job.rates ? K * P : 0);
  r.lambda = take(meta ? P : 0);
  r.direction = take(walks ? P : 0);
  r.adjoints = take(walks ? states * P : 0);
  r.rates = take(meta && job.rates ? job.rates_size[0] * job.rates_size[2] : 0);
  return r;
}

template <class S>
struct Program {
  const Job& job;
  Block<S> block;
  Room at;
  float* room;
  int64_t task, P;
  bool walks;

  FM_DEVICE Program(const Job& j, float* all)
      : job(j), block(j), at(room_of(j)), task(block_x()), P(count_parameters(j.net)) {
    room = all + task * at.size;
    walks = job.op == Op::k_maml && job.order == 2;
  }

  FM_DEVICE const float* row(const void* rows, int64_t stride) const {
    return static_cast<const float*>(rows) + task * stride;
  }
  FM_DEVICE float* theta(int64_t k) const {
    if (job.op == Op::k_maml) return room + at.thetas + (walks ? k * P : 0);
    if (job.thetas) return static_cast<float*>(job.thetas) + (k * job.data.tasks + task) * P;
    return static_cast<float*>(job.theta) + task * P;
  }
  // State i of the rule after step k.
  FM_DEVICE float* state(int i, int64_t k) const {
    const bool placed = walks && job.rule.kind == RuleKind::k_adam;
    return room + at.states + ((placed ? 2 * k : 0) + i) * P;
  }
  FM_DEVICE float rate(int64_t k, int64_t i) const {
    return static_cast<const float*>(
        job.lr)[k * job.lr_stride[0] + task * job.lr_stride[1] + i * job.lr_stride[2]];
  }

  // A pass of the task's loss; adjoints times the power of two nearest to the numbers of its mean.
  FM_DEVICE Pass loss_pass(const Data& data, int64_t step, bool back) const {
    Pass pass;
    pass.data = &data;
    pass.task = task;
    pass.step = step;
    pass.back = back;
    if (S::kMode == Mode::kFp16) {
      const int64_t numbers = block.points_of(pass) * job.net.out;
      while (static_cast<float>(numbers) > 1.4142135f * pass.scale) pass.scale *= 2;
    }
    return pass;
  }
  FM_DEVICE Pass given_pass(bool back) {
    Pass pass;
    pass.data = &job.data;
    pass.task = task;
    pass.back = back;
    const int64_t N = job.data.points;
    if (job.y) pass.y = static_cast<float*>(job.y) + task * N * job.net.out;
    if (job.gx) pass.gx = static_cast<float*>(job.gx) + task * N * job.net.in;
    if (job.w) pass.w = row(job.w, job.w_stride);
    if (job.gy) {
      pass.gy = row(job.gy, N * job.net.out);
      pass.scale = block.power_for(pass.gy, N * job.net.out);
    }
    return pass;
  }

  // Plain numbers ---

  FM_DEVICE void single() {
    const bool given = job.op == Op::k_mlp || job.op == Op::k_mlp_grad;
    const bool back = job.op != Op::k_mlp && job.op != Op::k_loss;
    const Pass pass = given ? given_pass(back) : loss_pass(job.data, job.step, back);
    block.load_parameters(row(job.params, job.params_stride), 0, 1.0f);
    const float loss = block.run(pass);
    if (job.loss && block.tid == 0) static_cast<float*>(job.loss)[task] = loss;
    if (!back) return;
    float* to = static_cast<float*>(job.grad) + task * P;
    const float undo = 1.0f / pass.scale;
    block.each_gradient([&](int i, float g) { to[i] = undo * g; });
  }

  FM_DEVICE void copy(const float* from, float* to) const {
    for (int64_t i = block.tid; i < P; i += S::kThreads) to[i] = from[i];
  }

  FM_DEVICE void inner_loop() {
    copy(row(job.params, job.params_stride), theta(0));
    for (int64_t k = 0; k < job.steps; ++k) {
      FM_MEET();  // θ_k is written
      block.load_parameters(theta(k), 0, 1.0f);
      const Pass pass = loss_pass(job.data, k, true);
      const float loss = block.run(pass), undo = 1.0f / pass.scale;
      if (job.op == Op::k_adapt && block.tid == 0)
        static_cast<float*>(job.loss)[k * job.data.tasks + task] = loss;
      const RuleAt<float> rule = rule_at<float>(job.rule, k);
      const int states = states_of(job.rule);
      const float* from = theta(k);
      float *to = theta(k + 1), *updates = job.op == Op::k_maml && job.rates
                                               ? room + at.updates + k * P
                                               : nullptr;
      block.each_gradient([&](int i, float g) {
        const float before = from[i];
        float s0 = states > 0 && k ? state(0, k - 1)[i] : 0.0f;
        float s1 = states > 1 && k ? state(1, k - 1)[i] : 0.0f;
        const float u = rule_step(rule, before, undo * g, s0, s1);
        if (states > 0) state(0, k)[i] = s0;
        if (states > 1) state(1, k)[i] = s1;
        if (updates) updates[i] = u;
        to[i] = before - rate(k, i) * u;
      });
    }
  }

  FM_DEVICE void adapt() {
    inner_loop();
    if (!job.thetas) return;
    FM_MEET();
    copy(theta(job.steps), static_cast<float*>(job.theta) + task * P);
  }

  // The inner loop and λ_K; the rates' gradient too where λ stays what it is.
  FM_DEVICE void meta_forward() {
    inner_loop();
    FM_MEET();
    block.load_parameters(theta(job.steps), 0, 1.0f);
    const Pass pass = loss_pass(job.query.tasks ? job.query : job.data, job.steps, true);
    const float loss = block.run(pass);
    if (block.tid == 0) static_cast<float*>(job.loss)[task] = loss;
    const float mean = 1.0f / (pass.scale * static_cast<float>(job.data.tasks));
    float* lambda = room + at.lambda;
    block.each_gradient([&](int i, float g) { lambda[i] = mean * g; });
    if (!job.rates || walks) return;
    FM_MEET();
    for (int64_t k = job.steps - 1; k >= 0; --k) add_rates(k);
  }

  // ā_k = −λ ⊙ u_k, summed over what the rates share, tasks excepted.
  FM_DEVICE void add_rates(int64_t k) {
    const int64_t *size = job.rates_size, kr = size[0] > 1 ? k : 0;
    const bool fresh = size[0] > 1 || k == job.steps - 1;
    const float *lambda = room + at.lambda, *u = room + at.updates + k * P;
    float* to = room + at.rates + kr * size[2];
    if (size[2] > 1) {
      for (int64_t i = block.tid; i < P; i += S::kThreads)
        to[i] = (fresh ? 0.0f : to[i]) - lambda[i] * u[i];
      return;
    }
    float sum = 0;
    for (int64_t i = block.tid; i < P; i += S::kThreads) sum = fused(lambda[i], u[i], sum);
    sum = block.block_sum(sum);
    if (block.tid == 0) *to = (fresh ? 0.0f : *to) - sum;
  }

  FM_DEVICE void plain() {
    if (job.op == Op::k_adapt) {
      adapt();
    } else if (job.op == Op::k_maml) {
      meta_forward();
    } else {
      single();
    }
  }

  // Dual numbers ---

  // The pass of a dual op along v, whose power of two joins the tangents; f(i, tangent of ∂L/∂p_i).
  template <class F>
  FM_DEVICE void along(Pass pass, const float* params, const float* v, F&& f) {
    float largest = 0;
    if (pass.w && S::kMode == Mode::kFp16) {
      const int64_t count = job.data.points * job.net.in;
      for (int64_t i = block.tid; i < count; i += S::kThreads) {
        const float x = abs(pass.w[i]);
        largest = x > largest ? x : largest;
      }
    }
    pass.along = block.power_for(v, P, largest);
    block.load_parameters(params, 0, 1.0f);
    block.load_parameters(v, 1, pass.along);
    block.run(pass);
    const float undo = 1.0f / pass.scale / pass.along;
    block.each_gradient([&](int i, float g) { f(i, undo * g); });
  }

  // ū = −α ⊙ λ through the rule's step k: the direction ḡ of the Hessian-vector product.
  FM_DEVICE void turn_back(int64_t k) {
    const RuleAt<float> rule = rule_at<float>(job.rule, k);
    const int states = states_of(job.rule);
    const bool last = k == job.steps - 1;
    const float* lambda = room + at.lambda;
    float *a0 = room + at.adjoints, *a1 = a0 + P, *to = room + at.direction;
    for (int64_t i = block.tid; i < P; i += S::kThreads) {
      float g = 0, m = 0, v = 0, x0 = 0, x1 = 0;
      if (states > 1) {
        m = state(0, k)[i];
        v = state(1, k)[i];
        g = (m - (k ? rule.beta1 * state(0, k - 1)[i] : 0.0f)) / rule.gain1;
      }
      if (states > 0 && !last) x0 = a0[i];
      if (states > 1 && !last) x1 = a1[i];
      to[i] = rule_adjoint(rule, -rate(k, i) * lambda[i], g, m, v, x0, x1);
      if (states > 0) a0[i] = x0;
      if (states > 1) a1[i] = x1;
    }
  }

  FM_DEVICE void walk() {
    float *lambda = room + at.lambda, *direction = room + at.direction;
    const float decay = job.rule.kind == RuleKind::k_momentum
                            ? static_cast<float>(job.rule.weight_decay)
                            : 0.0f;
    for (int64_t k = job.steps - 1; k >= 0; --k) {
      if (job.rates) add_rates(k);
      turn_back(k);
      FM_MEET();  // the direction is written
      along(loss_pass(job.data, k, true), theta(k), direction,
            [&](int i, float hv) { lambda[i] += hv + decay * direction[i]; });
      FM_MEET();  // λ is
    }
  }

  FM_DEVICE void dual() {
    if (job.op == Op::k_maml) return walk();
    const bool given = job.op == Op::k_mlp_dual;
    float* to = static_cast<float*>(given ? job.grad : job.hv) + task * P;
    along(given ? given_pass(true) : loss_pass(job.data, job.step, true),
          row(job.params, job.params_stride), row(job.v, job.v_stride),
          [&](int i, float g) { to[i] = g; });
  }
};

template <class S>
FM_KERNEL void
#if !defined(FM_EMULATE)
__launch_bounds__(S::kThreads)
#endif
    resident(const Job job, float* room) {
  Program<S> program(job, room);
  if constexpr (S::kDual) {
    program.dual();
  } else {
    program.plain();
  }
}

}  // namespace fastmeta
