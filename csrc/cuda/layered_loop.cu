// What a call does with networks of any size: passes layer by layer (layered.h), K inner steps and
// the walk back over them (walk.h), as launches on one stream.
//
// A pass takes as many tasks at a time as their activations fit the budget, at least one; where one
// task's do not fit, ranges of its points: the network then runs once over all of them for its
// outputs, whose loss and adjoints are those of the whole task, and once more range by range for the
// way back, half as much work again. Neither changes a bit: the parts that sums over points are made
// of depend on the sizes of the job alone, and are added in one order.
//
// Nothing is allocated, nothing waits for the device: everything lies in the caller's room, so that
// a CUDA graph holds a whole meta-gradient. Launches of a step: 3 a layer and about 6. The small
// kernels here are a thread a number (encode_back: a warp a point), 128 threads a block, no shared
// memory, no barrier, 20 to 44 registers (encode_back 54, dual 59; ptxas 13.0, sm_90).
#include <cmath>

#include "launch.h"
#include "layered.h"
#include "measure.h"
#include "sums.h"

namespace fastmeta {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// Small kernels ---

// h_0 of points: q in the identity columns, sin q in the others, q = x B + φ.
template <bool kDual>
FM_DEVICE void encode_one(const Network& net, const float* x, const float* w, int64_t f,
                          NumberOf<kDual>& h, NumberOf<kDual>& slope) {
  using Number = NumberOf<kDual>;
  const float *basis = static_cast<const float*>(net.basis) + f,
              *phase = static_cast<const float*>(net.phase);
  Number q = {};
  for (int64_t d = 0; d < net.in; ++d) {
    const float b = basis[d * net.encoded];
    if constexpr (kDual) {
      q.d = fused(w ? w[d] : 0.0f, b, q.d);
    }
    const float sum = fused(x[d], b, value(q));
    if constexpr (kDual) {
      q.a = sum;
    } else {
      q = sum;
    }
  }
  float unused;
  if (f < net.identity) {
    activate<Activation::k_none>(q + phase[f], 1.0f, h, slope);
  } else {
    bend<Mode::kFp32, true, Activation::k_sine>(q + phase[f], 1.0f, h, slope, unused);
  }
}

// Points from device memory: value and tangent, a row of them for each task.
struct Points {
  const float* at[2];
  int64_t task[2];
};

template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    encode(FM_CONSTANT Network net, FM_CONSTANT Points x, int64_t tasks, int64_t count,
           int64_t range, float* to) {
  const int64_t E = net.encoded, i = static_cast<int64_t>(block_x()) * kThreads + thread_index();
  if (i >= tasks * count * E) return;
  const int64_t task = i / (count * E), m = i / E % count, f = i % E;
  NumberOf<kDual> h, slope;
  const float* w = kDual ? x.at[1] + task * x.task[1] + m * net.in : nullptr;
  encode_one<kDual>(net, x.at[0] + task * x.task[0] + m * net.in, w, f, h, slope);
  const int64_t at = (task * range + m) * E + f;
  to[at] = value(h);
  if constexpr (kDual) to[tasks * range * E + at] = h.d;
}

// x̄ = (h_0' ⊙ h̄_0) Bᵀ of points, dual its tangent: a warp a point, its lanes features in turn.
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    encode_back(FM_CONSTANT Network net, FM_CONSTANT Points x, int64_t tasks, int64_t count,
                int64_t range, const float* below, float* gx, int64_t gx_task) {
  const int64_t E = net.encoded,
                item = static_cast<int64_t>(block_x()) * kWarps + thread_index() / 32;
  if (item >= tasks * count) return;
  const int64_t task = item / count, m = item % count;
  const float *at = x.at[0] + task * x.task[0] + m * net.in,
              *w = kDual && x.at[1] ? x.at[1] + task * x.task[1] + m * net.in : nullptr;
  for (int64_t d = 0; d < net.in; d += 4) {
    float sum[4] = {};
    for (int64_t f = thread_index() % 32; f < E; f += 32) {
      NumberOf<kDual> h, slope;
      encode_one<kDual>(net, at, w, f, h, slope);
      const int64_t from = (task * range + m) * E + f;
      float adjoint;
      if constexpr (kDual) {
        adjoint = kept(slope, {below[from], below[tasks * range * E + from]}, 0.0f);
      } else {
        adjoint = slope * below[from];
      }
      for (int i = 0; i < 4; ++i)
        if (d + i < net.in)
          sum[i] = fused(adjoint, static_cast<const float*>(net.basis)[(d + i) * E + f], sum[i]);
    }
    for (int i = 0; i < 4; ++i) {
      const float whole = warp_sum(sum[i]);
      if (thread_index() % 32 == 0 && d + i < net.in)
        gx[task * gx_task + m * net.in + d + i] = whole;
    }
  }
}

FM_DEVICE void leave_peak(float largest, float* peaks) {
  largest = warp_max(largest);
  const int64_t warp = static_cast<int64_t>(block_x()) * blocks_y() + block_y();
  if (thread_index() % 32 == 0) peaks[warp * kWarps + thread_index() / 32] = largest;
}
FM_DEVICE float larger(float x, float y) {
  y = abs(y);
  return y > x ? y : x;
}

// The largest of |v| and |w| of a task, one for each warp; blocks [tasks, slices].
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    peaks_along(const float* v, int64_t v_stride, int64_t v_count, const float* w, int64_t w_stride,
                int64_t w_count, float* peaks) {
  const int64_t from = static_cast<int64_t>(block_y()) * kThreads + thread_index(),
                step = static_cast<int64_t>(blocks_y()) * kThreads;
  float largest = 0;
  for (int64_t i = from; i < v_count; i += step)
    largest = larger(largest, v[block_x() * v_stride + i]);
  for (int64_t i = from; w && i < w_count; i += step)
    largest = larger(largest, w[block_x() * w_stride + i]);
  leave_peak(largest, peaks);
}

// δ_L = φ'(z_L) ⊙ ȳ in the slope's place [planes, tasks, count], and the largest of its values and
// of its tangents, one for each warp; blocks [tasks, slices].
template <bool kDual>
FM_KERNEL void FM_BOUNDS(kThreads, 8) turn(float* ends, FM_CONSTANT Points bar, int64_t plane,
                                           int64_t count, float* peaks, float* peaks_tangent) {
  float largest = 0, largest_tangent = 0;
  for (int64_t i = static_cast<int64_t>(block_y()) * kThreads + thread_index(); i < count;
       i += static_cast<int64_t>(blocks_y()) * kThreads) {
    float* at = ends + block_x() * count + i;
    const float y = bar.at[0][block_x() * bar.task[0] + i];
    if constexpr (kDual) {
      const float tangent = bar.at[1] ? bar.at[1][block_x() * bar.task[1] + i] : 0.0f;
      const Dual<float> delta = Dual<float>{at[0], at[plane]} * Dual<float>{y, tangent};
      at[0] = delta.a;
      at[plane] = delta.d;
      largest = larger(largest, delta.a);
      largest_tangent = larger(largest_tangent, delta.d);
    } else {
      *at *= y;
      largest = larger(largest, *at);
    }
  }
  leave_peak(largest, peaks);
  if (kDual) leave_peak(largest_tangent, peaks_tangent);
}

// What a launch does to every parameter of every task.
enum class Move : int { kStart, kStep, kLambda, kRates, kTurn, kPull, kLeave };

FM_KERNEL void FM_BOUNDS(kThreads, 8) walk(FM_CONSTANT Job job, FM_CONSTANT Room at, Move move,
                                           int64_t k, float* room, const float* gradient) {
  const int64_t P = at.parameters, blocks = (P + kThreads - 1) / kThreads, T = job.data.tasks,
                i = block_x() % blocks * kThreads + thread_index();
  if (i >= P) return;
  const Walk own(job, at, room, block_x() / blocks);
  const float* g = gradient + own.task * P + i;
  switch (move) {
    case Move::kStart:
      own.theta(0)[i] = own.row(job.params, job.params_stride)[i];
      return;
    case Move::kStep:
      return own.step(rule_at<float>(job.rule, k), k, i, *g);
    case Move::kLambda:
      own.room[at.lambda + i] = *g * (1.0f / static_cast<float>(T));
      return;
    case Move::kRates:
      return own.add_rate(k, i);
    case Move::kTurn:
      return own.turn_back(rule_at<float>(job.rule, k), k, i);
    case Move::kPull:
      return own.pull(i, *g);
    case Move::kLeave:
      static_cast<float*>(job.theta)[own.task * P + i] = own.theta(job.steps)[i];
      return;
  }
}

// Σ λ ⊙ u_k of a task where parameters share a rate: first each warp's own, then those, in order.
FM_KERNEL void FM_BOUNDS(kThreads, 8)
    rate_parts(FM_CONSTANT Job job, FM_CONSTANT Room at, int64_t k, float* room, float* parts) {
  const Walk own(job, at, room, block_x());
  const float *lambda = own.room + at.lambda, *u = own.room + at.updates + k * own.P;
  float sum = 0;
  for (int64_t i = static_cast<int64_t>(block_y()) * kThreads + thread_index(); i < own.P;
       i += static_cast<int64_t>(blocks_y()) * kThreads)
    sum = fused(lambda[i], u[i], sum);
  sum = warp_sum(sum);
  if (thread_index() % 32) return;
  parts[(own.task * blocks_y() + block_y()) * kWarps + thread_index() / 32] = sum;
}
FM_KERNEL void FM_BOUNDS(kThreads, 8) rate_sums(FM_CONSTANT Job job, FM_CONSTANT Room at, int64_t k,
                                                float* room, const float* parts, int64_t count) {
  const int64_t task = static_cast<int64_t>(block_x()) * kThreads + thread_index();
  if (task >= job.data.tasks) return;
  const Walk own(job, at, room, task);
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += parts[task * count + i];
  bool fresh;
  float* to = own.rates(k, fresh);
  *to = (fresh ? 0.0f : *to) - sum;
}

// Sizes ---

int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks that share a row of numbers; they leave kWarps peaks or sums each.
int64_t slices_of(int64_t count) { return most(1, least(64, up_to(count, 2048))); }

bool is_given(const Job& job) {
  return job.op == Op::k_mlp || job.op == Op::k_mlp_grad || job.op == Op::k_mlp_dual;
}
bool loops(const Job& job) { return job.op == Op::k_adapt || job.op == Op::k_maml; }

// What is in device memory at a time: so many tasks, and points of each; part: points of which a
// block sums a gradient.
struct Cut {
  int64_t tasks, points, range, part;
  int planes;
  bool back;
};

// Where it lies, in floats.
struct Buffers {
  float *x, *y, *ends, *measure, *peaks, *peaks_tangent, *along, *features, *below, *parts,
      *h[kMaxDepth], *slopes[kMaxDepth];
  int64_t size;
};

Buffers buffers_of(const Job& job, const Data& data, const Cut& cut, float* room) {
  const Network& net = job.net;
  const int64_t T = cut.tasks, H = net.width, P = count_parameters(net);
  Buffers b = {};
  const auto take = [&](int64_t count) {
    float* at = room ? room + b.size : nullptr;
    b.size += up_to(count, 4) * 4;
    return at;
  };
  const int64_t rows = cut.planes * T * cut.range;
  if (!is_given(job)) {
    b.x = take(T * cut.points * net.in);
    b.y = take(cut.planes * T * cut.points * net.out);
    b.measure = take(measure_room(data, T, cut.planes == 2));
  }
  if (cut.back) b.ends = take(cut.planes * T * cut.points * net.out);
  b.peaks = take(T * slices_of(cut.points * net.out) * kWarps);
  b.peaks_tangent = take(T * slices_of(cut.points * net.out) * kWarps);
  b.along = take(T * slices_of(P) * kWarps);
  if (net.encoded) b.features = take(rows * net.encoded);
  if (net.encoded && job.gx) b.below = take(rows * net.encoded);
  for (int64_t l = 0; l < net.depth - 1; ++l) {
    b.h[l] = cut.back || l < 2 ? take(rows * H) : b.h[l - 2];
    if (cut.back) b.slopes[l] = take(rows * H);
  }
  if (cut.back && cut.points > cut.part) b.parts = take(T * up_to(cut.range, cut.part) * P);
  return b;
}

Cut cut_of(const Job& job, const Data& data, bool dual, bool back) {
  const int64_t T = job.data.tasks, M = is_given(job) ? data.points : network_points(data),
                side = up_to(job.net.width, kSide);
  Cut cut = {1, M, M, M, dual ? 2 : 1, back};
  // two blocks for each multiprocessor of a large device, whatever the device and the budget, so
  // that sums have one order; at most 4096 points a part, so that ranges can be small
  const int64_t parts = most(1, least(264 / (T * side * side), up_to(M, 128)));
  cut.part = least(4096, up_to(up_to(M, parts), kSide) * kSide);
  cut.range = up_to(M, cut.part) * cut.part;
  const int64_t has = job.budget / 4;
  const auto floats = [&] { return buffers_of(job, data, cut, nullptr).size; };
  const int64_t one = floats();
  if (one <= has) {
    cut.tasks = least(T, has / one);
    return cut;
  }
  const int64_t every = cut.range;
  cut.range = cut.part;
  const int64_t least_floats = floats();
  if (every == cut.part || has <= least_floats) return cut;
  const int64_t each = up_to(one - least_floats, every / cut.part - 1);
  cut.range = least(every, cut.part * (1 + (has - least_floats) / each));
  return cut;
}

struct Layer {
  int64_t in, out, weight, bias;
  bool bare, last, exact;  // reads coordinates; writes outputs; fp32 whatever the mode
};

Layer layer_of(const Network& net, int64_t l) {
  Layer y = {};
  const int64_t E = encoded_features(net), H = net.width;
  y.last = l == net.depth - 1;
  y.bare = l == 0 && !net.encoded;
  y.in = l ? H : E;
  y.out = y.last ? net.out : H;
  y.weight = l ? H * (E + 1) + (l - 1) * H * (H + 1) : 0;
  y.bias = y.weight + y.in * y.out;
  y.exact = y.last || y.bare || (l == 0 && net.activation == Activation::k_sine);
  return y;
}

// A pass over all tasks.
struct Pass {
  const Data* data;
  int64_t step;
  bool back;
  const float* params;
  int64_t params_stride;
  const float* v;  // null: plain
  int64_t v_stride;
  float* loss;   // [T], or null
  float* grad;   // [T, P]: of a dual pass the tangent; null where back is false
  float* plain;  // [T, P] of a dual pass: the gradient itself, or null
};

// One call ---

class Call {
 public:
  Call(const Job& j, const Layered& mode, const Layered& exact, float* room, void* s)
      : job(j), net(j.net), hidden(mode), edge(exact), at(room_of(j)), stream(s) {
    T = job.data.tasks;
    P = at.parameters;
    const auto take = [&](int64_t count) {
      float* from = room ? room + fixed : nullptr;
      fixed += up_to(count, 4) * 4;
      return from;
    };
    rooms = take(T * at.size);
    gradient = take(loops(job) ? T * P : 0);
    rate_part = take(loops(job) ? T * slices_of(P) * kWarps : 0);
    work = take(0);
  }

  // Floats of room that all of it takes.
  int64_t size() const {
    int64_t largest = 0;
    const bool dual = job.op == Op::k_mlp_dual || job.op == Op::k_loss_hvp ||
                      (job.op == Op::k_maml && job.order == 2 && job.steps);
    const bool plain = job.op != Op::k_mlp_dual && job.op != Op::k_loss_hvp;
    const bool back = job.op != Op::k_mlp && job.op != Op::k_loss;
    for (const Data* data : {&job.data, &job.query})
      for (const bool along : {false, true})
        if (data->tasks && (along ? dual && data == &job.data : plain)) {
          const Cut cut = cut_of(job, *data, along, back);
          largest = most(largest, buffers_of(job, *data, cut, nullptr).size);
        }
    return fixed + largest;
  }

  int run() {
    if (loops(job)) {
      inner();
      if (job.op == Op::k_maml) outer();
      return error;
    }
    Pass pass = {};
    pass.data = &job.data;
    pass.step = job.step;
    pass.back = job.op != Op::k_mlp && job.op != Op::k_loss;
    pass.params = static_cast<const float*>(job.params);
    pass.params_stride = job.params_stride;
    if (job.op == Op::k_mlp_dual || job.op == Op::k_loss_hvp) {
      pass.v = static_cast<const float*>(job.v);
      pass.v_stride = job.v_stride;
    }
    pass.loss = static_cast<float*>(job.loss);
    pass.grad = static_cast<float*>(job.op == Op::k_loss_hvp ? job.hv : job.grad);
    pass.plain = static_cast<float*>(job.op == Op::k_loss_hvp ? job.grad : nullptr);
    over_tasks(pass);
    return error;
  }

 private:
  const Job& job;
  const Network& net;
  const Layered &hidden, &edge;
  const Room at;
  void* stream;
  float *rooms, *gradient, *rate_part, *work;
  int64_t T, P, fixed = 0;
  int error = 0;
  // of the chunk at hand
  Cut cut;
  Buffers b;
  int64_t first;
  Points x;

  bool dual() const { return cut.planes == 2; }

  // Inner loops ---

  void move(Move what, int64_t k) {
    if (error) return;
    error = FM_LAUNCH(walk, T * up_to(P, kThreads), 1, kThreads, 0, stream, job, at, what, k, rooms,
                      gradient);
  }

  // θ_k of the tasks, as Walk::theta places them.
  Pass pass_at(int64_t k, const Data& data) const {
    Pass pass = {};
    pass.data = &data;
    pass.step = k;
    pass.back = true;
    pass.grad = gradient;
    pass.params_stride = P;
    if (job.op == Op::k_maml) {
      pass.params = rooms + at.thetas + (job.order == 2 ? k * P : 0);
      pass.params_stride = at.size;
    } else if (job.thetas) {
      pass.params = static_cast<const float*>(job.thetas) + k * T * P;
    } else {
      pass.params = static_cast<const float*>(job.theta);
    }
    return pass;
  }

  void inner() {
    move(Move::kStart, 0);
    for (int64_t k = 0; k < job.steps; ++k) {
      Pass pass = pass_at(k, job.data);
      if (job.op == Op::k_adapt && job.loss) pass.loss = static_cast<float*>(job.loss) + k * T;
      over_tasks(pass);
      move(Move::kStep, k);
    }
    if (job.op == Op::k_adapt && job.thetas) move(Move::kLeave, 0);
  }

  void outer() {
    Pass query = pass_at(job.steps, job.query.tasks ? job.query : job.data);
    query.loss = static_cast<float*>(job.loss);
    over_tasks(query);
    move(Move::kLambda, 0);
    for (int64_t k = job.steps - 1; k >= 0; --k) {
      if (job.rates) rates(k);
      if (job.order != 2) continue;
      move(Move::kTurn, k);
      Pass pass = pass_at(k, job.data);
      pass.v = rooms + at.direction;
      pass.v_stride = at.size;
      over_tasks(pass);
      move(Move::kPull, k);
    }
    if (!error) error = leave_meta(job, rooms, at, stream);
  }

  void rates(int64_t k) {
    if (job.rates_size[2] > 1) return move(Move::kRates, k);
    if (error) return;
    const int64_t slices = slices_of(P);
    error = FM_LAUNCH(rate_parts, T, slices, kThreads, 0, stream, job, at, k, rooms, rate_part);
    if (error) return;
    error = FM_LAUNCH(rate_sums, up_to(T, kThreads), 1, kThreads, 0, stream, job, at, k, rooms,
                      rate_part, slices * kWarps);
  }

  // A pass ---

  void over_tasks(const Pass& pass) {
    cut = cut_of(job, *pass.data, pass.v, pass.back);
    const int64_t chunk = cut.tasks;
    for (first = 0; first < T && !error; first += chunk) {
      cut.tasks = least(chunk, T - first);
      b = buffers_of(job, *pass.data, cut, work);
      over_points(pass);
    }
  }

  void over_points(const Pass& pass) {
    const Chunk chunk = {pass.data, pass.step, first, cut.tasks};
    if (is_given(job)) {
      x = {{static_cast<const float*>(job.data.x) + first * job.data.x_stride, nullptr},
           {job.data.x_stride, job.w_stride}};
      if (job.w) x.at[1] = static_cast<const float*>(job.w) + first * job.w_stride;
    } else {
      x = {{b.x, nullptr}, {cut.points * net.in, 0}};
      error = lay_points(net, chunk, b.x, b.measure, stream);
    }
    if (dual() && !error) {
      const int64_t numbers = cut.points * net.in;
      error = FM_LAUNCH(peaks_along, cut.tasks, slices_of(P), kThreads, 0, stream,
                        pass.v + first * pass.v_stride, pass.v_stride, P, x.at[1], x.task[1],
                        numbers, b.along);
    }
    const bool whole = cut.range >= cut.points;
    for (int64_t start = 0; start < cut.points; start += cut.range)
      forward(pass, start, pass.back && whole, true);
    if (!is_given(job) && !error)
      error = measure_loss(net, chunk, dual(), pass.back, b.y,
                           pass.loss ? pass.loss + first : nullptr, b.measure, stream);
    if (!pass.back) return;
    leave_ends();
    for (int64_t start = 0; start < cut.points && !error; start += cut.range) {
      if (!whole) forward(pass, start, true, false);
      backward(pass, start);
      gradients(start, dual(), pass.grad);
      if (pass.plain) gradients(start, false, pass.plain);
    }
  }

  int64_t count(int64_t start) const { return least(cut.range, cut.points - start); }

  Peaks along() const { return {b.along, static_cast<int>(slices_of(P) * kWarps)}; }
  Peaks peaks(const float* from) const {
    return {from, static_cast<int>(slices_of(cut.points * net.out) * kWarps)};
  }

  void leave_ends() {
    const int64_t numbers = cut.points * net.out, plane = cut.tasks * numbers;
    Points bar = {{b.y, b.y + plane}, {numbers, numbers}};
    if (is_given(job))
      bar = {{static_cast<const float*>(job.gy) + first * numbers, nullptr}, {numbers, 0}};
    if (error) return;
    const int64_t slices = slices_of(numbers);
    if (dual()) {
      error = FM_LAUNCH(turn<true>, cut.tasks, slices, kThreads, 0, stream, b.ends, bar, plane,
                        numbers, b.peaks, b.peaks_tangent);
    } else {
      error = FM_LAUNCH(turn<false>, cut.tasks, slices, kThreads, 0, stream, b.ends, bar, plane,
                        numbers, b.peaks, nullptr);
    }
  }

  // Rows that the layers read and leave, of a range.
  Rows rows_of(float* at, int64_t points, int64_t start, int64_t features, int64_t range) const {
    const int64_t task = range * features, plane = cut.tasks * task;
    at += start * features;
    return {{at, dual() ? at + plane : nullptr},
            {task, task},
            features,
            static_cast<int>(points),
            static_cast<int>(features)};
  }
  Rows input_of(int64_t l, int64_t start) const {
    const int64_t points = count(start);
    if (l) return rows_of(b.h[l - 1], points, 0, net.width, cut.range);
    Rows rows = rows_of(b.features, points, 0, net.encoded, cut.range);
    if (!net.encoded) {
      rows = {{x.at[0] + start * net.in, x.at[1] ? x.at[1] + start * net.in : nullptr},
              {x.task[0], x.task[1]},
              net.in,
              static_cast<int>(points),
              static_cast<int>(net.in)};
    }
    if (!dual() || !x.at[1]) rows.at[1] = nullptr;
    return rows;
  }
  Rows delta_of(int64_t l, int64_t start) const {
    const int64_t points = count(start);
    if (l == net.depth - 1) return rows_of(b.ends, points, start, net.out, cut.points);
    return rows_of(b.slopes[l], points, 0, net.width, cut.range);
  }
  Rows weights_of(const Pass& pass, const Layer& y) const {
    const float *params = pass.params + first * pass.params_stride + y.weight,
                *v = pass.v ? pass.v + first * pass.v_stride + y.weight : nullptr;
    return {{params, v},
            {pass.params_stride, pass.v_stride},
            y.in,
            static_cast<int>(y.out),
            static_cast<int>(y.in)};
  }

  // A product with C [rows, columns]: its tiles, and what it sums over.
  void multiply(Way way, const Layer& y, bool along_too, bool narrow, Product& p, int64_t rows,
                int64_t columns, int64_t depth, int64_t part) {
    if (error) return;
    p.rows = static_cast<int>(rows);
    p.columns = static_cast<int>(columns);
    p.row_tiles = static_cast<int>(up_to(rows, kSide));
    p.column_tiles = static_cast<int>(up_to(columns, narrow ? kNarrow : kSide));
    p.depth = static_cast<int>(depth);
    p.part = static_cast<int>(part);
    p.ends = peaks(b.peaks);
    p.ends_along = peaks(b.peaks_tangent);
    p.along = along();
    error = (y.exact ? edge : hidden)
                .product(way, along_too, narrow, p, cut.tasks, up_to(depth, part), stream);
  }

  void encode_points(int64_t start) {
    const int64_t points = count(start);
    Points from = x;
    for (int i = 0; i < 2; ++i)
      if (from.at[i]) from.at[i] += start * net.in;
    const int64_t blocks = up_to(cut.tasks * points * net.encoded, kThreads);
    if (error) return;
    if (dual() && x.at[1]) {
      error = FM_LAUNCH(encode<true>, blocks, 1, kThreads, 0, stream, net, from, cut.tasks, points,
                        cut.range, b.features);
    } else {
      error = FM_LAUNCH(encode<false>, blocks, 1, kThreads, 0, stream, net, from, cut.tasks, points,
                        cut.range, b.features);
    }
  }

  // keep: slopes too, for the way back; last: the last layer too.
  void forward(const Pass& pass, int64_t start, bool keep, bool last) {
    if (net.encoded) encode_points(start);
    for (int64_t l = 0; l < net.depth - (last ? 0 : 1); ++l) {
      const Layer y = layer_of(net, l);
      Product p = {};
      p.a = input_of(l, start);
      p.b = weights_of(pass, y);
      p.bias[0] = pass.params + first * pass.params_stride + y.bias;
      p.bias_task[0] = pass.params_stride;
      if (pass.v) {
        p.bias[1] = pass.v + first * pass.v_stride + y.bias;
        p.bias_task[1] = pass.v_stride;
      }
      p.activation = net.activation;
      p.output = net.output;
      p.w0 = static_cast<float>(l ? net.w0 : net.w0_first);
      p.shift = static_cast<float>(net.shift);
      const bool slopes = y.last ? pass.back : keep;
      if (slopes) {
        const Rows to = delta_of(l, start);
        for (int i = 0; i < cut.planes; ++i) p.slopes[i] = const_cast<float*>(to.at[i]);
        p.slopes_task = to.task[0];
      }
      if (y.last) {
        leave_outputs(p, start);
      } else {
        leave_rows(p, rows_of(b.h[l], count(start), 0, net.width, cut.range));
      }
      multiply(Way::kForward, y, dual(), y.last, p, count(start), y.out, y.in, y.in);
    }
  }

  static void leave_rows(Product& p, const Rows& rows) {
    for (int i = 0; i < 2; ++i) {
      p.to[i] = const_cast<float*>(rows.at[i]);
      p.to_task[i] = rows.task[i];
    }
    p.to_row = rows.row;
  }
  void leave_outputs(Product& p, int64_t start) const {
    if (!is_given(job)) return leave_rows(p, rows_of(b.y, 0, start, net.out, cut.points));
    const int64_t task = cut.points * net.out;
    p.to_row = net.out;
    p.to_task[0] = p.to_task[1] = task;
    if (job.y) p.to[dual() ? 1 : 0] = static_cast<float*>(job.y) + first * task + start * net.out;
  }

  void backward(const Pass& pass, int64_t start) {
    for (int64_t l = net.depth - 1; l >= (job.gx ? 0 : 1); --l) {
      const Layer y = layer_of(net, l);
      Product p = {};
      p.a = delta_of(l, start);
      p.b = weights_of(pass, y);
      const int64_t points = count(start);
      if (l) {
        const Rows to = delta_of(l - 1, start);
        leave_rows(p, to);
        for (int i = 0; i < 2; ++i) p.slopes[i] = p.to[i];
        p.slopes_task = to.task[0];
      } else if (net.encoded) {
        leave_rows(p, rows_of(b.below, points, 0, net.encoded, cut.range));
      } else {
        p.to[0] = gx(start);
        p.to_task[0] = cut.points * net.in;
        p.to_row = net.in;
      }
      multiply(Way::kBack, y, dual(), y.bare, p, points, y.in, y.out, y.out);
    }
    if (job.gx && net.encoded) encode_back_points(start);
  }
  float* gx(int64_t start) const {
    return static_cast<float*>(job.gx) + (first * cut.points + start) * net.in;
  }
  void encode_back_points(int64_t start) {
    const int64_t points = count(start), blocks = up_to(cut.tasks * points, kWarps);
    Points from = x;
    for (int i = 0; i < 2; ++i)
      if (from.at[i]) from.at[i] += start * net.in;
    if (error) return;
    if (dual()) {
      error = FM_LAUNCH(encode_back<true>, blocks, 1, kThreads, 0, stream, net, from, cut.tasks,
                        points, cut.range, b.below, gx(start), cut.points * net.in);
    } else {
      error = FM_LAUNCH(encode_back<false>, blocks, 1, kThreads, 0, stream, net, from, cut.tasks,
                        points, cut.range, b.below, gx(start), cut.points * net.in);
    }
  }

  // W̄ and b̄ of every layer over a range, added to those of the ranges before.
  void gradients(int64_t start, bool along_too, float* to) {
    const int64_t points = count(start), parts = up_to(points, cut.part);
    to += first * P;
    for (int64_t l = 0; l < net.depth; ++l) {
      const Layer y = layer_of(net, l);
      Product p = {};
      p.to[0] = b.parts ? b.parts : to;
      p.to_task[0] = b.parts ? parts * P : P;
      p.to_part = P;
      p.weight_at = y.weight;
      p.bias_at = y.bias;
      p.a = y.last ? input_of(l, start) : delta_of(l, start);
      p.b = y.last ? delta_of(l, start) : input_of(l, start);
      p.ones = static_cast<int>(y.in);
      p.flipped = y.last;
      const bool narrow = y.last || y.bare;
      const int64_t rows = y.last ? y.in + 1 : y.out, columns = y.last   ? y.out
                                                                : narrow ? y.in + 1
                                                                         : y.in;
      multiply(Way::kGradient, y, along_too, narrow, p, rows, columns, points, cut.part);
    }
    if (b.parts && !error)
      error = sum_parts(b.parts, parts, P, to, P, cut.tasks, P, 0, start > 0, stream);
  }
};

}  // namespace

#define FM_DECLARE(mode) extern const Layered kLayered_##mode;
FM_MODES(FM_DECLARE)
#undef FM_DECLARE

namespace {
#define FM_POINTER(mode) &kLayered_##mode,
const Layered* const kLayered[] = {FM_MODES(FM_POINTER)};
#undef FM_POINTER
}  // namespace

int64_t layered_room(const Job& job, int mode) {
  return Call(job, *kLayered[mode], *kLayered[0], nullptr, nullptr).size();
}

int run_layered(const Job& job, int mode, float* room, void* stream) {
  return Call(job, *kLayered[mode], *kLayered[0], room, stream).run();
}

}  // namespace fastmeta
