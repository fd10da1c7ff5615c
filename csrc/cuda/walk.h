// An inner loop's arrays, and what one step does to one parameter of a task, forward and back: the
// same whether a block walks over its task's parameters or a launch over those of all tasks.
//
//   θ_{k+1} = θ_k − α_k ⊙ u_k;  ū = −α_k ⊙ λ, ḡ by the rule's adjoint, ā_k = −λ ⊙ u_k
#pragma once

#include "../math/rules.h"
#include "device.h"

namespace fastmeta {

// Where a task's arrays lie in the room that the caller gives, in floats; size is that of a task.
struct Room {
  int64_t thetas, states, updates, lambda, direction, adjoints, rates, size, parameters;
};

FM_HOST_DEVICE int64_t encoded_features(const Network& n) { return n.encoded ? n.encoded : n.in; }
FM_HOST_DEVICE int64_t count_parameters(const Network& n) {
  return n.width * (encoded_features(n) + 1) + (n.depth - 2) * n.width * (n.width + 1) +
         n.out * (n.width + 1);
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
  r.parameters = P;
  return r;
}

// A task's walk: room is its own row.
struct Walk {
  const Job& job;
  const Room& at;
  float* room;
  int64_t task, P;
  bool walks;

  FM_DEVICE Walk(const Job& j, const Room& r, float* rooms, int64_t t)
      : job(j),
        at(r),
        room(rooms + t * r.size),
        task(t),
        P(r.parameters),
        walks(j.op == Op::k_maml && j.order == 2) {}

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

  // Step k's update of parameter i.
  FM_DEVICE void step(const RuleAt<float>& rule, int64_t k, int64_t i, float g) const {
    const int states = states_of(job.rule);
    const float before = theta(k)[i];
    float s0 = states > 0 && k ? state(0, k - 1)[i] : 0.0f;
    float s1 = states > 1 && k ? state(1, k - 1)[i] : 0.0f;
    const float u = rule_step(rule, before, g, s0, s1);
    if (states > 0) state(0, k)[i] = s0;
    if (states > 1) state(1, k)[i] = s1;
    if (job.op == Op::k_maml && job.rates) room[at.updates + k * P + i] = u;
    theta(k + 1)[i] = before - rate(k, i) * u;
  }

  // ū = −α ⊙ λ through the rule's step k: the direction ḡ of the Hessian-vector product.
  FM_DEVICE void turn_back(const RuleAt<float>& rule, int64_t k, int64_t i) const {
    const int states = states_of(job.rule);
    const bool last = k == job.steps - 1;
    float *a0 = room + at.adjoints, *a1 = a0 + P;
    float g = 0, m = 0, v = 0, x0 = 0, x1 = 0;
    if (states > 1) {
      m = state(0, k)[i];
      v = state(1, k)[i];
      g = (m - (k ? rule.beta1 * state(0, k - 1)[i] : 0.0f)) / rule.gain1;
    }
    if (states > 0 && !last) x0 = a0[i];
    if (states > 1 && !last) x1 = a1[i];
    room[at.direction + i] = rule_adjoint(rule, -rate(k, i) * room[at.lambda + i], g, m, v, x0, x1);
    if (states > 0) a0[i] = x0;
    if (states > 1) a1[i] = x1;
  }

  // λ_k from λ_{k+1} and H_k ḡ.
  FM_DEVICE void pull(int64_t i, float hv) const {
    const float decay =
        job.rule.kind == RuleKind::k_momentum ? static_cast<float>(job.rule.weight_decay) : 0.0f;
    room[at.lambda + i] += hv + decay * room[at.direction + i];
  }

  // Where step k's rates gather; fresh: nothing does yet.
  FM_DEVICE float* rates(int64_t k, bool& fresh) const {
    const int64_t* size = job.rates_size;
    fresh = size[0] > 1 || k == job.steps - 1;
    return room + at.rates + (size[0] > 1 ? k : 0) * size[2];
  }
  // ā_k = −λ ⊙ u_k where each parameter has its rate.
  FM_DEVICE void add_rate(int64_t k, int64_t i) const {
    bool fresh;
    float* to = rates(k, fresh);
    to[i] = (fresh ? 0.0f : to[i]) - room[at.lambda + i] * room[at.updates + k * P + i];
  }
};

}  // namespace fastmeta
