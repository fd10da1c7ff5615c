// Whole tasks by one block each, or by a team of blocks: single passes, K inner steps, and the walk
// back over them.
//
//   adapt     θ_{k+1} = θ_k − α_k ⊙ u_k, losses[k] = L_k(θ_k)
//   maml      the same, then λ_K = ∇L_query(θ_K) / T (plain kernel); then
//             λ_k = λ_{k+1} + H_k ḡ_k (+ ω ḡ_k), ā_k = −λ_{k+1} ⊙ u_k (dual kernel)
//
// of points or along rays, on bare coordinates or features (tile.h); a query may be of the other kind.
// One launch runs all steps of all tasks. A pass over a share of a task's tiles leaves a row of
// sums, in shared memory over the operands, which are done with then; of few tasks with many points
// there are several shares, run by a team (team.h). The team meets, and each number's owner, a
// thread that stays its owner, adds the rows in the order of the shares (of more than 16, every
// fourth by each of four lanes, then the four) and moves its θ, states or λ, which are float32 in
// device memory, read and written once a step: 8 bytes a parameter and step against 24 multiply-adds
// a parameter and 64 points. Then the team meets again. Single passes leave the rows to a small
// second kernel; so are sums over tasks, in the order of the tasks. All sums have a fixed order,
// which follows from the job, not from the device.
#pragma once

#include "tile.h"
#include "walk.h"

namespace fastmeta {

// Worked out before the launch: it lies among the kernel's arguments and takes no registers.
struct Plan {
  Layout layout;
  Room at;
  float* room;        // [T, at.size]
  int shares;         // of a task's tiles
  bool cluster;       // a block a share, whose shared memory the others read
  bool held;          // a block's row lies in its shared memory
  float* rows;        // [T, shares, P + 1], where they do not
  uint32_t* arrived;  // [T, kCountStride]: blocks of a team that met, where it is no cluster
};
constexpr int kCountStride = 32;  // a line of 128 bytes a task

// kLoops: adapt and maml; else single passes. A kernel each: what the other needs takes no registers.
template <class S, bool kLoops>
struct Program : Walk {
  const Plan& plan;
  Block<S> block;

  FM_DEVICE Program(const Job& j, const Plan& p)
      : Walk(j, p.at, p.room, block_x()), plan(p), block(j, p.layout) {}

  FM_DEVICE bool meta() const { return kLoops && job.op == Op::k_maml; }

  // A pass of the task's loss; adjoints times the power of two nearest to the numbers of its mean.
  FM_DEVICE Pass loss_pass(const Data& data, int64_t step, bool back) const {
    Pass pass;
    pass.data = &data;
    pass.task = task;
    pass.step = static_cast<uint32_t>(step);
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

  // Teams ---

  FM_DEVICE uint32_t* arrived() const { return plan.arrived + task * kCountStride; }

  // Where this block leaves a share's sums, and where they are read.
  FM_DEVICE float* row_for(int share) const {
    return plan.held ? block.floats(0) : plan.rows + (task * plan.shares + share) * (P + 1);
  }
  FM_DEVICE const float* row_from(int share) const {
    return plan.cluster ? of_rank(block.floats(0), share) : row_for(share);
  }

  // This block's shares of a pass; a single pass of one share leaves its sums where they are wanted.
  FM_DEVICE void run_shares(Pass& pass) {
    FM_UNROLL_1 for (pass.share = block_y(); pass.share < plan.shares; pass.share += blocks_y()) {
      if (pass.share >= blocks_y()) FM_MEET();  // the last share's sums are read
      pass.shares = plan.shares;
      const float mean = block.run(pass);
      const bool wanted = !kLoops && plan.shares == 1;
      float* to = wanted ? static_cast<float*>(gradient_wanted()) + task * P : row_for(pass.share);
      float* loss = wanted ? loss_wanted(0) : to + P;
      if (block.tid == 0 && loss && job.op != Op::k_mlp) *loss = mean;
      const float undo = 1.0f / pass.scale / pass.along;
      if (pass.back) block.each_gradient([&](int i, float g) { to[i] = undo * g; });
      if (!kLoops) return;  // a block a share
    }
  }
  FM_DEVICE void* gradient_wanted() const {
    return S::kDual && job.op == Op::k_loss_hvp ? job.hv : job.grad;
  }
  FM_DEVICE float* loss_wanted(int64_t k) const {
    if (S::kDual || !job.loss) return nullptr;
    return static_cast<float*>(job.loss) + k * job.data.tasks + task;
  }

  // The numbers 0 to P have owners among the team's threads: f(i, part) for this thread's; where
  // four lanes work on one, for each of them, and f comes to whole warps, beyond P too.
  FM_DEVICE int lanes() const { return plan.shares > 16 ? 4 : 1; }
  template <class F>
  FM_DEVICE void each_place(F&& f) const {
    const int many = 32 / lanes(), lane = block.tid % 32;
    const int first = (block_y() * S::kWarps + block.warp) * many;
    FM_UNROLL_1 for (int i = first; i <= P; i += blocks_y() * S::kWarps * many) {
      f(i + lane % many, lane / many);
    }
  }
  // f(i) for the parameters that this thread owns.
  template <class F>
  FM_DEVICE void each_own(F&& f) const {
    each_place([&](int i, int part) {
      if (part == 0 && i < P) f(i);
    });
  }
  // f(i, Σ of the shares' place i) for the numbers that this thread owns; number P is the loss.
  template <class F>
  FM_DEVICE void each_sum(F&& f) const {
    constexpr int kBatch = 8;  // loads under way together
    each_place([&](int i, int part) {
      float sum = 0;
      FM_UNROLL_1 for (int s = part; s < plan.shares && i <= P; s += kBatch * lanes()) {
        float x[kBatch];
        FM_UNROLL for (int j = 0; j < kBatch; ++j) {
          const int share = s + j * lanes();
          x[j] = share < plan.shares ? row_from(share)[i] : 0.0f;
        }
        FM_UNROLL for (int j = 0; j < kBatch; ++j) sum += x[j];
      }
      if (lanes() > 1) {
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
      }
      if (part == 0 && i <= P) f(i, sum);
    });
  }

  // Plain numbers ---

  FM_DEVICE void copy(const float* from, float* to) const {
    each_own([&](int i) { to[i] = from[i]; });
  }

  // Single passes; the K passes of an inner loop; and for maml one more, of the query, which leaves
  // λ_K. One loop for all: the pass is compiled once.
  FM_DEVICE void plain() {
    const bool given = !kLoops && (job.op == Op::k_mlp || job.op == Op::k_mlp_grad);
    const bool back = kLoops || (job.op != Op::k_mlp && job.op != Op::k_loss);
    const int steps = kLoops ? static_cast<int>(job.steps) : 0;
    const int passes = steps + (meta() || !kLoops ? 1 : 0);
    if (kLoops) copy(row(job.params, job.params_stride), theta(0));
    FM_UNROLL_1 for (int k = 0; k < passes; ++k) {
      if (kLoops) FM_MEET_TEAM(plan.cluster, arrived());  // θ_k is written, the last rows are read
      const bool last = k == steps;
      const Data& data = meta() && last && job.query.tasks ? job.query : job.data;
      Pass pass = given ? given_pass(back) : loss_pass(data, kLoops ? k : job.step, back);
      block.load_parameters(kLoops ? theta(k) : row(job.params, job.params_stride), 0, 1.0f);
      run_shares(pass);
      if (!kLoops) return;
      FM_MEET_TEAM(plan.cluster, arrived());  // the rows are left
      const RuleAt<float> rule = rule_at<float>(job.rule, k);
      each_sum([&](int i, float g) {
        if (i == P) {
          float* loss = loss_wanted(last ? 0 : k);
          if (loss && (last || !meta())) *loss = g;
        } else if (last) {
          room[at.lambda + i] = g / static_cast<float>(job.data.tasks);
        } else {
          step(rule, k, i, g);
        }
      });
    }
    if (job.thetas) copy(theta(steps), static_cast<float*>(job.theta) + task * P);
    if (meta() && job.rates && !walks) {
      FM_MEET_TEAM(plan.cluster, arrived());                  // λ is written
      for (int64_t k = steps - 1; k >= 0; --k) add_rates(k);  // it stays what it is
    }
    if (plan.cluster) FM_MEET_TEAM(true, arrived());  // this block's rows are read
  }

  // ā_k = −λ ⊙ u_k, summed over what the rates share, tasks excepted; over parameters by one block,
  // in an order that knows of no team.
  FM_DEVICE void add_rates(int64_t k) {
    if (job.rates_size[2] > 1) {
      each_own([&](int i) { add_rate(k, i); });
      return;
    }
    if (block_y() < blocks_y() - 1) return;
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
    const bool given = !kLoops && job.op == Op::k_mlp_dual;
    const float* direction = room + at.direction;
    FM_UNROLL_1 for (int k = kLoops ? static_cast<int>(job.steps) - 1 : 0; k >= 0; --k) {
      if (kLoops) {
        const RuleAt<float> rule = rule_at<float>(job.rule, k);
        each_own([&](int i) { turn_back(rule, k, i); });
        FM_MEET_TEAM(plan.cluster, arrived());  // the direction is written, the last rows are read
        if (job.rates) add_rates(k);
      }
      Pass pass = given ? given_pass(true) : loss_pass(job.data, kLoops ? k : job.step, true);
      const float* v = kLoops ? direction : row(job.v, job.v_stride);
      pass.along = power_along(pass, v);
      block.load_parameters(kLoops ? theta(k) : row(job.params, job.params_stride), 0, 1.0f);
      block.load_parameters(v, 1, pass.along);
      run_shares(pass);
      if (!kLoops) return;
      FM_MEET_TEAM(plan.cluster, arrived());  // the rows are left
      each_sum([&](int i, float g) {
        if (i < P) pull(i, g);
      });
    }
    if (plan.cluster) FM_MEET_TEAM(true, arrived());  // this block's rows are read
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

template <class S, bool kLoops>
FM_KERNEL void FM_BOUNDS(S::kThreads, S::kBlocks)
    resident(FM_CONSTANT Job job, FM_CONSTANT Plan plan) {
  Program<S, kLoops> program(job, plan);
  if constexpr (S::kDual) {
    program.dual();
  } else {
    program.plain();
  }
}

}  // namespace fastmeta
