// The programs: what a call does with each of its tasks, and the memory and threads it does it
// with.
//
// Tasks are shared out twice: first as many whole tasks to each thread as there are for all, then
// the rest to crews of several threads. All memory is planned and taken before the threads start;
// nothing is allocated while they run.
#pragma once

#include <omp.h>

#include "../math/rules.h"
#include "arena.h"
#include "pass.h"

namespace fastmeta {
namespace FM_ISA {

#ifndef FM_TILE_BYTES
#define FM_TILE_BYTES (1 << 19)
#endif
constexpr int64_t kTileBytes = FM_TILE_BYTES;

template <class T>
struct Engine {
  Job job;
  Plan<T> plan;
  Grid grid, query;
  Store store;
  int flights;  // tasks in flight at a time, at most
  bool dual, keeps_updates;
  int states;  // of the inner rule, per parameter
  Hand<T>* hands;
  Shared<T>* shared;
  T* fixed;  // the packed encoding
};

// Memory ---

template <class T>
void carve_hand(Carver& c, const Engine<T>& e, int64_t capacity, Hand<T>& h) {
  const bool moves = e.job.w != nullptr;
  carve_tile(c, e.plan, capacity, e.dual, moves, h.tile);
  const bool march = e.grid.group > 1 || e.query.group > 1;
  if (march) carve_rays(c, capacity, e.dual, h.rays);
  h.grad = c.take<T>(e.plan.accumulated);
  h.grad_d = e.dual ? c.take<T>(e.plan.accumulated) : nullptr;
  h.row = c.take<T>(e.plan.encodes ? 0 : kWidth<T> * e.plan.net.in);
  const bool meta = e.job.op == Op::k_maml;
  h.sum = meta ? c.take<T>(e.plan.params) : nullptr;
  const int64_t* size = e.job.rates_size;
  const int64_t own_rates = size[2] == 1 ? size[0] * size[1] : size[1] == 1 ? size[0] * size[2] : 0;
  h.rate_sum = e.job.rates ? c.take<T>(own_rates) : nullptr;
}

template <class T>
int64_t projected(const Data& d, bool lines) {
  return d.measure != Measure::k_project ? 0 : lines ? d.angles * d.size : d.size * d.size;
}

template <class T>
void carve_shared(Carver& c, const Engine<T>& e, Shared<T>& s) {
  const Job& job = e.job;
  const int64_t P = e.plan.params, K = job.steps;
  const bool loops = job.op == Op::k_adapt || job.op == Op::k_maml,
             walks = job.op == Op::k_maml && job.order == 2;
  s.packed = c.take<T>(e.plan.packed);
  s.packed_v = e.dual ? c.take<T>(e.plan.packed) : nullptr;
  s.theta = loops ? c.take<T>(walks ? (K + 1) * P : P) : nullptr;
  // second order walks back over Adam's states; otherwise each state has one place
  const int64_t places = walks && job.rule.kind == RuleKind::k_adam ? K : 1;
  for (int i = 0; i < 2; ++i) s.state[i] = loops && i < e.states ? c.take<T>(places * P) : nullptr;
  s.updates = e.keeps_updates ? c.take<T>(K * P) : nullptr;
  s.lambda = job.op == Op::k_maml ? c.take<T>(P) : nullptr;
  s.direction = walks ? c.take<T>((1 + e.states) * P) : nullptr;
  s.image =
      c.planes<T>(most(projected<T>(job.data, false), projected<T>(job.query, false)), e.dual);
  s.line = c.planes<T>(most(projected<T>(job.data, true), projected<T>(job.query, true)), e.dual);
  s.kept = c.take<T>(e.store.slots * e.store.slot_size);
  s.temporary = c.take<T>(e.store.temporaries * e.store.temporary_size);
}

// How many tiles may be kept within the budget: temporaries of a projection first, then steps of a
// meta-gradient.
template <class T>
void plan_store(Engine<T>& e, int64_t capacity) {
  const Job& job = e.job;
  int64_t budget = job.budget / most(1, e.flights) / static_cast<int64_t>(sizeof(T));
  const bool back = job.op != Op::k_mlp && job.op != Op::k_loss;
  e.store.temporary_size = e.plan.kept_z * capacity * (e.dual ? 2 : 1);
  if (back && e.store.temporary_size && job.data.measure == Measure::k_project)
    e.store.temporaries = least(e.grid.tiles, budget / e.store.temporary_size);
  budget -= e.store.temporaries * e.store.temporary_size;
  e.store.slot_size = (e.plan.kept_z + e.plan.kept_h) * capacity;
  if (job.op == Op::k_maml && job.order == 2 && e.store.slot_size)
    e.store.slots = least(e.grid.tiles * job.steps, budget / e.store.slot_size);
}

template <class T>
void plan_engine(Engine<T>& e, const Job& job) {
  e.job = job;
  const bool external = job.op == Op::k_mlp_grad || job.op == Op::k_mlp_dual;
  make_plan(e.plan, job.net, external && job.gx != nullptr);
  e.dual = job.op == Op::k_loss_hvp || job.op == Op::k_mlp_dual ||
           (job.op == Op::k_maml && job.order == 2);
  e.states = job.rule.kind == RuleKind::k_adam ? 2 : job.rule.kind == RuleKind::k_momentum ? 1 : 0;
  e.keeps_updates = job.op == Op::k_maml && job.rates != nullptr;
  const int64_t T_ = job.data.tasks, n = job.threads;
  const int64_t rest = T_ % n, crew = rest ? ceil_div(n, rest) : 1;
  e.flights = static_cast<int>(T_ >= n ? n : T_);
  // a tile: panels that fit the second-level cache beside the weights on their way through, 64 to
  // 128 points
  const int64_t lanes = Pack<T>::kLanes;
  const int64_t per_point =
      job.net.width * (job.net.depth - 1) * 2 * (e.dual ? 2 : 1) * static_cast<int64_t>(sizeof(T));
  const int64_t target = most(64, least(128, kTileBytes / per_point)) / lanes * lanes;
  e.grid = make_grid(e.job.data, target, lanes, crew);
  e.query = e.job.query.tasks ? make_grid(e.job.query, target, lanes, crew) : e.grid;
  if (!e.job.query.tasks) e.query.data = &e.job.data;
}

template <class T>
int64_t capacity_of(const Engine<T>& e) {
  const int64_t points = most(e.grid.tile * e.grid.group, e.query.tile * e.query.group);
  return ceil_div(points, Pack<T>::kLanes) * Pack<T>::kLanes;
}

template <class T>
void carve_engine(Carver& c, Engine<T>& e) {
  const int64_t capacity = capacity_of(e);
  e.hands = c.take<Hand<T>>(e.job.threads);
  e.shared = c.take<Shared<T>>(e.flights);
  e.fixed = c.take<T>(e.plan.fixed);
  Hand<T> hand;
  Shared<T> shared;
  for (int i = 0; i < e.job.threads; ++i) carve_hand(c, e, capacity, c.base ? e.hands[i] : hand);
  for (int i = 0; i < e.flights; ++i) carve_shared(c, e, c.base ? e.shared[i] : shared);
}

template <class T>
void pack_encoding(const Plan<T>& p, T* fixed) {
  constexpr int W = kWidth<T>;
  const T *basis = static_cast<const T*>(p.net.basis), *phase = static_cast<const T*>(p.net.phase);
  const int64_t E = p.encoded, D = p.net.in, row = padded<T>(E);
  for (int64_t e = 0; e < row; ++e) {
    fixed[p.phase + e] = e < E ? phase[e] : T(0);
    for (int64_t d = 0; d < D; ++d) {
      const T value = e < E ? basis[d * E + e] : T(0);
      fixed[p.basis + (e / W * D + d) * W + e % W] = value;
      if (p.want_x) fixed[p.basis_rows + d * row + e] = value;
    }
  }
}

// Programs ---

template <class T>
const T* row_of(const void* rows, int64_t stride, int64_t task) {
  return static_cast<const T*>(rows) + task * stride;
}

// Packs a row of parameters, each hand its units, and meets.
template <class T>
void pack_all(const Crew<T>& crew, const Plan<T>& p, const T* params, T* packed) {
  each_unit(crew, p, [&](const Layer& y, int64_t b) { pack_rows(y, b, params, packed); });
  crew.meet();
}

template <class T>
Pass<T> support_pass(const Engine<T>& e, int64_t task, int64_t step, bool grad, bool tangent) {
  Pass<T> pass;
  pass.grid = &e.grid;
  pass.store = &e.store;
  pass.task = task;
  pass.step = step;
  pass.want_grad = grad;
  pass.want_tangent = tangent;
  return pass;
}

template <class T>
void write_gradient(const Crew<T>& crew, const Plan<T>& p, T* Hand<T>::*which, T* to) {
  each_unit(crew, p, [&](const Layer& y, int64_t b) {
    each_piece(crew, y, b, which, [&](int64_t at, int64_t count, const T* g) {
      for (int64_t i = 0; i < count; ++i) to[at + i] = g[i];
    });
  });
}

// mlp, mlp_grad, mlp_dual, loss, loss_grad, loss_hvp: one pass over one task.
template <class T>
void single_pass(const Engine<T>& e, const Crew<T>& crew, int64_t task) {
  const Job& job = e.job;
  const Plan<T>& p = e.plan;
  Shared<T>& s = *crew.shared;
  const T* params = row_of<T>(job.params, job.params_stride, task);
  const bool packed = job.params_stride == 0 && s.packed_from == params;
  crew.meet();  // nobody asks for packed_from any more
  if (!packed) {
    if (crew.rank == 0) s.packed_from = params;
    pack_all(crew, p, params, s.packed);
  }
  if (e.dual) pack_all(crew, p, row_of<T>(job.v, job.v_stride, task), s.packed_v);
  const bool back = job.op != Op::k_mlp && job.op != Op::k_loss;
  Pass<T> pass = support_pass(e, task, job.step, back && job.op != Op::k_mlp_dual, e.dual);
  const int64_t N = job.data.points, outs = task * N * job.net.out, ins = task * N * job.net.in;
  if (job.y) pass.y = static_cast<T*>(job.y) + outs;
  if (job.gy) pass.gy = static_cast<const T*>(job.gy) + outs;
  if (job.gx) pass.gx = static_cast<T*>(job.gx) + ins;
  if (job.w) pass.w = row_of<T>(job.w, job.w_stride, task);
  if (e.dual) {
    run_pass<T, true>(crew, s.packed, s.packed_v, pass);
  } else {
    run_pass<T, false>(crew, s.packed, nullptr, pass);
  }
  if (job.loss && crew.rank == 0) static_cast<T*>(job.loss)[task] = loss_of(crew);
  T* grad = static_cast<T*>(job.grad) + task * p.params;
  if (job.grad)
    write_gradient(crew, p, job.op == Op::k_mlp_dual ? &Hand<T>::grad_d : &Hand<T>::grad, grad);
  if (job.hv) write_gradient(crew, p, &Hand<T>::grad_d, static_cast<T*>(job.hv) + task * p.params);
  crew.meet();
}

// α of one task and step, one number for each parameter or one for all.
template <class T>
struct Rates {
  const T* at;
  int64_t stride;  // 1 or 0
  T operator[](int64_t i) const { return at[stride * i]; }
  // f(i, α_i) for i in [first, first + count), a plain loop for either kind
  template <class F>
  void each(int64_t first, int64_t count, F&& f) const {
    if (stride) {
      for (int64_t i = first; i < first + count; ++i) f(i, at[i]);
    } else {
      for (int64_t i = first; i < first + count; ++i) f(i, at[0]);
    }
  }
};

template <class T>
Rates<T> rates_at(const Job& job, int64_t task, int64_t k) {
  return {static_cast<const T*>(job.lr) + k * job.lr_stride[0] + task * job.lr_stride[1],
          job.lr_stride[2]};
}

// One inner step on a unit: θ' = θ − α ⊙ u, packed at once. States move in place, or from place k−1
// to place k.
template <class T>
void update_unit(const Engine<T>& e, const Crew<T>& crew, int64_t task, int64_t k, const Layer& y,
                 int64_t b, const T* theta, T* next) {
  const Job& job = e.job;
  const int64_t P = e.plan.params;
  Shared<T>& s = *crew.shared;
  const RuleAt<T> rule = rule_at<T>(job.rule, k);
  const Rates<T> lr = rates_at<T>(job, task, k);
  const bool placed = job.op == Op::k_maml && job.order == 2 && rule.kind == RuleKind::k_adam;
  const int64_t to = placed ? k * P : 0, from = placed && k ? to - P : to;
  each_piece(crew, y, b, &Hand<T>::grad, [&](int64_t at, int64_t count, const T* g) {
    T *s0 = s.state[0], *s1 = s.state[1], *kept = s.updates ? s.updates + k * P + at : nullptr;
    if (rule.kind == RuleKind::k_sgd && !kept) {
      lr.each(at, count, [&](int64_t i, T rate) { next[i] = theta[i] - rate * g[i - at]; });
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      T a = s0 && k ? s0[from + at + i] : T(0), c = s1 && k ? s1[from + at + i] : T(0);
      const T u = rule_step(rule, theta[at + i], g[i], a, c);
      if (s0) s0[to + at + i] = a;
      if (s1) s1[to + at + i] = c;
      if (kept) kept[i] = u;
      next[at + i] = theta[at + i] - lr[at + i] * u;
    }
  });
  pack_rows(y, b, next, s.packed);
}

template <class T>
void copy_unit(const Layer& y, int64_t b, const T* from, T* to) {
  each_range<T>(y, b, [&](int64_t at, int64_t count) {
    for (int64_t i = at; i < at + count; ++i) to[i] = from[i];
  });
}

// K inner steps from the start; θ_k lies at theta + k·stride. Afterwards θ_K is packed.
template <class T>
void inner_loop(const Engine<T>& e, const Crew<T>& crew, int64_t task, int64_t stride) {
  const Job& job = e.job;
  const int64_t P = e.plan.params;
  Shared<T>& s = *crew.shared;
  const auto keep = [&](const Layer& y, int64_t b, int64_t k, const T* theta) {
    if (job.thetas)
      copy_unit(y, b, theta, static_cast<T*>(job.thetas) + (k * job.data.tasks + task) * P);
  };
  each_unit(crew, e.plan, [&](const Layer& y, int64_t b) {
    copy_unit(y, b, row_of<T>(job.params, job.params_stride, task), s.theta);
    keep(y, b, 0, s.theta);
    pack_rows(y, b, s.theta, s.packed);
  });
  crew.meet();
  for (int64_t k = 0; k < job.steps; ++k) {
    Pass<T> pass = support_pass(e, task, k, true, false);
    pass.slot = k * e.grid.tiles;
    pass.keep = Keep::kStore;
    run_pass<T, false>(crew, s.packed, nullptr, pass);
    if (job.op == Op::k_adapt && crew.rank == 0)
      static_cast<T*>(job.loss)[k * job.data.tasks + task] = loss_of(crew);
    const T* theta = s.theta + k * stride;
    T* next = s.theta + (k + 1) * stride;
    each_unit(crew, e.plan, [&](const Layer& y, int64_t b) {
      update_unit(e, crew, task, k, y, b, theta, next);
      keep(y, b, k + 1, next);
    });
    crew.meet();
  }
}

template <class T>
void adapt(const Engine<T>& e, const Crew<T>& crew, int64_t task) {
  inner_loop(e, crew, task, 0);
  T* theta = static_cast<T*>(e.job.theta) + task * e.plan.params;
  each_unit(crew, e.plan,
            [&](const Layer& y, int64_t b) { copy_unit(y, b, crew.shared->theta, theta); });
  crew.meet();
}

// ā_k = −λ ⊙ u_k on a unit, added to where the rates' shape sums it.
template <class T>
void add_rates(const Engine<T>& e, const Crew<T>& crew, int64_t task, int64_t k, const Layer& y,
               int64_t b) {
  const int64_t *size = e.job.rates_size, P = e.plan.params;
  const int64_t kr = size[0] > 1 ? k : 0, tr = size[1] > 1 ? task : 0;
  const T *lambda = crew.shared->lambda, *u = crew.shared->updates + k * P;
  const bool shared_by_tasks = size[1] == 1, one = size[2] == 1;
  T* to = one || shared_by_tasks ? crew.hand().rate_sum : static_cast<T*>(e.job.rates);
  to += (kr * size[1] + tr) * size[2];
  each_range<T>(y, b, [&](int64_t at, int64_t count) {
    if (one) {
      double total = 0;
      for (int64_t i = at; i < at + count; ++i)
        total += static_cast<double>(lambda[i]) * static_cast<double>(u[i]);
      *to -= static_cast<T>(total);
    } else {
      for (int64_t i = at; i < at + count; ++i) to[i] -= lambda[i] * u[i];
    }
  });
}

// ū = −α ⊙ λ through the rule's step k: the direction ḡ of the Hessian-vector product, packed at
// once.
template <class T>
void direction_unit(const Engine<T>& e, const Crew<T>& crew, int64_t task, int64_t k,
                    const Layer& y, int64_t b) {
  const Job& job = e.job;
  const int64_t P = e.plan.params;
  Shared<T>& s = *crew.shared;
  const RuleAt<T> rule = rule_at<T>(job.rule, k);
  const Rates<T> lr = rates_at<T>(job, task, k);
  const bool adam = rule.kind == RuleKind::k_adam, last = k == job.steps - 1;
  T *a0 = s.direction + P,
    *a1 = s.direction + 2 * P;  // adjoints of the states, where there are any
  each_range<T>(y, b, [&](int64_t at, int64_t count) {
    for (int64_t i = at; i < at + count; ++i) {
      const T ubar = -lr[i] * s.lambda[i];
      T g(0), m(0), v(0), x0(0), x1(0);
      if (adam) {
        m = s.state[0][k * P + i];
        v = s.state[1][k * P + i];
        g = (m - (k ? rule.beta1 * s.state[0][(k - 1) * P + i] : T(0))) / rule.gain1;
      }
      if (e.states > 0 && !last) x0 = a0[i];
      if (e.states > 1 && !last) x1 = a1[i];
      s.direction[i] = rule_adjoint(rule, ubar, g, m, v, x0, x1);
      if (e.states > 0) a0[i] = x0;
      if (e.states > 1) a1[i] = x1;
    }
  });
  pack_rows(y, b, s.theta + k * P, s.packed);
  pack_rows(y, b, s.direction, s.packed_v);
}

// The meta-gradient of one task: K steps, the query's gradient λ_K, and in second order
// λ_k = λ_{k+1} + H_k ḡ_k (+ ω ḡ_k), H_k of the support loss with step k's own draw.
template <class T>
void maml(const Engine<T>& e, const Crew<T>& crew, int64_t task) {
  const Job& job = e.job;
  const int64_t P = e.plan.params, K = job.steps;
  Shared<T>& s = *crew.shared;
  const bool second = job.order == 2;
  inner_loop(e, crew, task, second ? P : 0);
  Pass<T> query = support_pass(e, task, K, true, false);
  query.grid = &e.query;
  run_pass<T, false>(crew, s.packed, nullptr, query);
  if (crew.rank == 0) static_cast<T*>(job.loss)[task] = loss_of(crew);
  const T mean = T(1) / static_cast<T>(job.data.tasks);
  each_unit(crew, e.plan, [&](const Layer& y, int64_t b) {
    each_piece(crew, y, b, &Hand<T>::grad, [&](int64_t at, int64_t count, const T* g) {
      for (int64_t i = 0; i < count; ++i) s.lambda[at + i] = mean * g[i];
    });
    if (job.rates && !second)
      for (int64_t k = K - 1; k >= 0; --k) add_rates(e, crew, task, k, y, b);
  });
  for (int64_t k = K - 1; second && k >= 0; --k) {
    each_unit(crew, e.plan, [&](const Layer& y, int64_t b) {
      if (job.rates) add_rates(e, crew, task, k, y, b);
      direction_unit(e, crew, task, k, y, b);
    });
    crew.meet();
    Pass<T> pass = support_pass(e, task, k, false, true);
    pass.slot = k * e.grid.tiles;
    pass.keep = Keep::kLoad;
    run_pass<T, true>(crew, s.packed, s.packed_v, pass);
    const T decay =
        job.rule.kind == RuleKind::k_momentum ? static_cast<T>(job.rule.weight_decay) : T(0);
    each_unit(crew, e.plan, [&](const Layer& y, int64_t b) {
      each_piece(crew, y, b, &Hand<T>::grad_d, [&](int64_t at, int64_t count, const T* hv) {
        for (int64_t i = 0; i < count; ++i) s.lambda[at + i] += hv[i] + decay * s.direction[at + i];
      });
    });
  }
  each_unit(crew, e.plan, [&](const Layer& y, int64_t b) {
    each_range<T>(y, b, [&](int64_t at, int64_t count) {
      for (int64_t i = at; i < at + count; ++i) crew.hand().sum[i] += s.lambda[i];
    });
  });
  crew.meet();
}

template <class T>
void run_task(const Engine<T>& e, const Crew<T>& crew, int64_t task) {
  switch (e.job.op) {
    case Op::k_adapt:
      return adapt(e, crew, task);
    case Op::k_maml:
      return maml(e, crew, task);
    default:
      return single_pass(e, crew, task);
  }
}

// Sums of the threads in order: meta-gradient and rates.
template <class T>
void sum_threads(const Engine<T>& e, int threads, int rank) {
  const auto add = [&](T* Hand<T>::*which, int64_t count, T* to) {
    for (int64_t i = count * rank / threads; i < count * (rank + 1) / threads; ++i) {
      T total = (e.hands[0].*which)[i];
      for (int h = 1; h < threads; ++h) total += (e.hands[h].*which)[i];
      to[i] = total;
    }
  };
  add(&Hand<T>::sum, e.plan.params, static_cast<T*>(e.job.grad));
  const int64_t* size = e.job.rates_size;
  if (e.job.rates && (size[2] == 1 || size[1] == 1))
    add(&Hand<T>::rate_sum, size[0] * size[1] * size[2], static_cast<T*>(e.job.rates));
}

template <class T>
void clear_sums(const Engine<T>& e, Hand<T>& h) {
  const int64_t* size = e.job.rates_size;
  for (int64_t i = 0; i < e.plan.params; ++i) h.sum[i] = 0;
  if (e.job.rates && (size[2] == 1 || size[1] == 1))
    for (int64_t i = 0; i < size[0] * size[1] * size[2]; ++i) h.rate_sum[i] = 0;
}

// A thread's part of a call.
template <class T>
void run_thread(Engine<T>& e, int threads, int rank) {
  const int64_t tasks = e.job.data.tasks, own = tasks / threads, rest = tasks % threads;
  Hand<T>& hand = e.hands[rank];
  hand.tile.plan = &e.plan;
  hand.tile.x_moves = e.job.w != nullptr;
  hand.tile.fixed = e.fixed;
  if (e.job.op == Op::k_maml) clear_sums(e, hand);
  if (own) {
    const Crew<T> alone{&e.shared[rank], &e.hands[rank], 1, 0};
    for (int64_t t = rank * own; t < (rank + 1) * own; ++t) run_task(e, alone, t);
  }
#pragma omp barrier
  if (rest) {  // crew c has threads [n c / rest, n (c+1) / rest)
    const int64_t c = ((rank + 1) * rest - 1) / threads;
    const int first = static_cast<int>(threads * c / rest),
              last = static_cast<int>(threads * (c + 1) / rest);
    const Crew<T> crew{&e.shared[c], &e.hands[first], last - first, rank - first};
    run_task(e, crew, threads * own + c);
  }
#pragma omp barrier
  if (e.job.op == Op::k_maml) sum_threads(e, threads, rank);
}

template <class T>
void run_job(const Job& job, Arena& arena) {
  Engine<T> e{};
  plan_engine(e, job);
  plan_store(e, capacity_of(e));
  Carver count{nullptr};
  carve_engine(count, e);
  Carver real{arena.reserve(count.used)};
  carve_engine(real, e);
  if (e.plan.encodes) pack_encoding(e.plan, e.fixed);
  for (int i = 0; i < e.flights; ++i) {
    e.shared[i].gate = Gate{};
    e.shared[i].packed_from = nullptr;
  }
#pragma omp parallel num_threads(e.job.threads)
  run_thread(e, omp_get_num_threads(), omp_get_thread_num());
}

}  // namespace FM_ISA
}  // namespace fastmeta
