// Whole tasks by one block each: single passes, K inner steps, and the walk back over them.
//
//   adapt     θ_{k+1} = θ_k − α_k ⊙ u_k, losses[k] = L_k(θ_k)
//   maml      the same, then λ_K = ∇L_query(θ_K) / T (plain kernel); then
//             λ_k = λ_{k+1} + H_k ḡ_k (+ ω ḡ_k), ā_k = −λ_{k+1} ⊙ u_k (dual kernel)
//
// of points or along rays, on bare coordinates or features (tile.h); a query may be of the other kind.
// Single passes of few tasks share the points or rays of a task among blocks, whose sums a small
// second kernel adds in order. One launch runs all steps of all tasks; the operands stay in shared
// memory for a pass, θ, the rule's states and λ are float32 in device memory, which is read and
// written once a step by the block that owns the task: 8 bytes a parameter and step against 24
// multiply-adds a parameter and 64 points. Sums over tasks are a small second kernel, in the order of the tasks.
#pragma once

#include "tile.h"
#include "walk.h"

namespace fastmeta {

// Worked out before the launch: it lies among the kernel's arguments and takes no registers.
struct Plan {
  Layout layout;
  Room at;
  float* room;  // of single passes that several blocks share: a row of P + 1 for each block
};

template <class S>
struct Program : Walk {
  Block<S> block;
  float* part;

  FM_DEVICE Program(const Job& j, const Plan& plan)
      : Walk(j, plan.at, plan.room, block_x()), block(j, plan.layout) {
    part = plan.room + (task * blocks_y() + block_y()) * (P + 1);
  }

  // A pass of the task's loss; adjoints times the power of two nearest to the numbers of its mean.
  FM_DEVICE Pass loss_pass(const Data& data, int64_t step, bool back) const {
    Pass pass;
    pass.data = &data;
    pass.task = task;
    pass.step = step;
    pass.back = back;
    if (S::kMode == Mode::kFp16 && !block.marches(pass)) {  // rays: tile by tile
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

  FM_DEVICE void copy(const float* from, float* to) const {
    for (int64_t i = block.tid; i < P; i += S::kThreads) to[i] = from[i];
  }

  // Single passes; the K passes of an inner loop; and for maml one more, of the query, which leaves
  // λ_K. One loop for all: the pass is compiled once.
  FM_DEVICE void plain() {
    const bool meta = job.op == Op::k_maml, loops = meta || job.op == Op::k_adapt;
    const bool given = job.op == Op::k_mlp || job.op == Op::k_mlp_grad;
    const bool back = job.op != Op::k_mlp && job.op != Op::k_loss;
    const int64_t steps = loops ? job.steps : 0, passes = steps + (meta || !loops ? 1 : 0);
    if (loops) copy(row(job.params, job.params_stride), theta(0));
    FM_UNROLL_1 for (int64_t k = 0; k < passes; ++k) {
      if (loops) FM_MEET();  // θ_k is written
      const bool last = k == steps;
      const Data& data = meta && last && job.query.tasks ? job.query : job.data;
      const Pass pass = given ? given_pass(back) : loss_pass(data, loops ? k : job.step, back);
      block.load_parameters(loops ? theta(k) : row(job.params, job.params_stride), 0, 1.0f);
      const float loss = block.run(pass);
      const bool shared = !loops && blocks_y() > 1;  // with other blocks
      if (block.tid == 0 && shared && job.op != Op::k_mlp) {
        part[P] = loss;
      } else if (block.tid == 0 && job.loss && (last || !meta)) {
        static_cast<float*>(job.loss)[(last ? 0 : k * job.data.tasks) + task] = loss;
      }
      if (!back) return;
      const float undo = 1.0f / pass.scale;
      const float share = meta ? undo / static_cast<float>(job.data.tasks) : undo;
      float* to = shared ? part
                  : meta ? room + at.lambda
                         : static_cast<float*>(job.grad) + task * P;
      const RuleAt<float> rule = rule_at<float>(job.rule, k);
      block.each_gradient([&](int i, float g) {
        if (last) {
          to[i] = share * g;
        } else {
          step(rule, k, i, undo * g);
        }
      });
    }
    if (meta ? !job.rates || walks : !job.thetas) return;
    FM_MEET();
    if (job.thetas) return copy(theta(steps), static_cast<float*>(job.theta) + task * P);
    for (int64_t k = steps - 1; k >= 0; --k) add_rates(k);  // λ stays what it is
  }

  // ā_k = −λ ⊙ u_k, summed over what the rates share, tasks excepted.
  FM_DEVICE void add_rates(int64_t k) {
    if (job.rates_size[2] > 1) {
      for (int64_t i = block.tid; i < P; i += S::kThreads) add_rate(k, i);
      return;
    }
    const float *lambda = room + at.lambda, *u = room + at.updates + k * P;
    float sum = 0;
    for (int64_t i = block.tid; i < P; i += S::kThreads) sum = fused(lambda[i], u[i], sum);
    sum = block.block_sum(sum);
    bool fresh;
    float* to = rates(k, fresh);
    if (block.tid == 0) *to = (fresh ? 0.0f : *to) - sum;
  }

  // Dual numbers ---

  // Single dual passes, and the walk back: ḡ, H ḡ, λ of one step after the other.
  FM_DEVICE void dual() {
    const bool meta = job.op == Op::k_maml, given = job.op == Op::k_mlp_dual;
    float* direction = room + at.direction;
    float* to = blocks_y() > 1 ? part : static_cast<float*>(given ? job.grad : job.hv) + task * P;
    FM_UNROLL_1 for (int64_t k = meta ? job.steps - 1 : 0; k >= 0; --k) {
      if (meta) {
        if (job.rates) add_rates(k);
        const RuleAt<float> rule = rule_at<float>(job.rule, k);
        for (int64_t i = block.tid; i < P; i += S::kThreads) turn_back(rule, k, i);
        FM_MEET();  // the direction is written
      }
      Pass pass = given ? given_pass(true) : loss_pass(job.data, meta ? k : job.step, true);
      const float* v = meta ? direction : row(job.v, job.v_stride);
      pass.along = power_along(pass, v);
      block.load_parameters(meta ? theta(k) : row(job.params, job.params_stride), 0, 1.0f);
      block.load_parameters(v, 1, pass.along);
      block.run(pass);
      const float undo = 1.0f / pass.scale / pass.along;
      block.each_gradient([&](int i, float g) {
        if (meta) {
          pull(i, undo * g);
        } else {
          to[i] = undo * g;
        }
      });
      if (meta) FM_MEET();  // λ is written
    }
  }

  // The power of two on the tangents, from the largest of v and w.
  FM_DEVICE float power_along(const Pass& pass, const float* v) {
    float largest = 0;
    if (pass.w && S::kMode == Mode::kFp16) {
      const int64_t count = job.data.points * job.net.in;
      for (int64_t i = block.tid; i < count; i += S::kThreads) {
        const float x = abs(pass.w[i]);
        largest = x > largest ? x : largest;
      }
    }
    return block.power_for(v, P, largest);
  }
};

template <class S>
FM_KERNEL void FM_BOUNDS(S::kThreads, S::kBlocks)
    resident(FM_CONSTANT Job job, FM_CONSTANT Plan plan) {
  Program<S> program(job, plan);
  if constexpr (S::kDual) {
    program.dual();
  } else {
    program.plain();
  }
}

}  // namespace fastmeta
