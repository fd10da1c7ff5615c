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
// a CUDA graph holds a whole meta-gradient. Launches of a step: 3 a layer and about 8.
#include <cmath>

#include "launch.h"
#include "layered_small.h"
#include "measure.h"
#include "sums.h"

namespace fastmeta {
namespace {

constexpr int kThreads = kSmallThreads, kWarps = kSmallWarps;

// Sizes ---

int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks that share a row of numbers; they leave kWarps peaks or sums each.
int64_t slices_of(int64_t count) { return most(1, least(64, up_to(count, 2048))); }

bool is_given(const Job& job) {
  return job.op == Op::k_mlp || job.op == Op::k_mlp_grad || job.op == Op::k_mlp_dual;
}
bool loops(const Job& job) { return job.op == Op::k_adapt || job.op == Op::k_maml; }

// Of tasks' weights (0) or their tangents (1): one where all share it.
int64_t sets_of(const Job& job, int plane, int64_t tasks) {
  return loops(job) || (plane ? job.v_stride : job.params_stride) ? tasks : 1;
}

// What is in device memory at a time: so many tasks, and points of each; part: points of which a
// block sums a gradient.
struct Cut {
  int64_t tasks, points, range, part;
  int planes;
  bool back;
};

// Where it lies, in floats.
struct Buffers {
  float *x, *y, *ends, *measure, *peaks, *peaks_tangent, *along, *weights[2], *features, *below,
      *parts, *h[kMaxDepth], *slopes[kMaxDepth];
  int64_t size;
};

Buffers buffers_of(const Job& job, const Data& data, const Cut& cut, float* room) {
  const Network& net = job.net;
  const int64_t T = cut.tasks, P = count_parameters(net);
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
  for (int plane = 0; plane < cut.planes; ++plane)
    b.weights[plane] = take(sets_of(job, plane, T) * weights_at(net, net.depth));
  if (net.encoded) b.features = take(rows * row_of(net.encoded));
  if (net.encoded && job.gx) b.below = take(rows * row_of(net.encoded));
  for (int64_t l = 0; l < net.depth - 1; ++l) {
    b.h[l] = cut.back || l < 2 ? take(rows * row_of(net.width)) : b.h[l - 2];
    if (cut.back) b.slopes[l] = take(rows * row_of(net.width));
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
    align_weights(pass);
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

  // Rows that the layers read and leave, of a range; row: from one to the next.
  Rows rows_of(float* at, int64_t start, int64_t features, int64_t row, int64_t range,
               int64_t points) const {
    const int64_t task = range * row, plane = cut.tasks * task;
    at += start * row;
    return {{at, dual() ? at + plane : nullptr},
            {task, task},
            row,
            static_cast<int>(points),
            static_cast<int>(features)};
  }
  Rows layer_rows(float* at, int64_t features, int64_t points) const {
    return rows_of(at, 0, features, row_of(features), cut.range, points);
  }
  Rows end_rows(float* at, int64_t start, int64_t points) const {
    return rows_of(at, start, net.out, net.out, cut.points, points);
  }
  Rows input_of(int64_t l, int64_t start) const {
    const int64_t points = count(start);
    if (l) return layer_rows(b.h[l - 1], net.width, points);
    if (net.encoded) {
      Rows rows = layer_rows(b.features, net.encoded, points);
      if (!x.at[1]) rows.at[1] = nullptr;
      return rows;
    }
    return {{x.at[0] + start * net.in, dual() && x.at[1] ? x.at[1] + start * net.in : nullptr},
            {x.task[0], x.task[1]},
            net.in,
            static_cast<int>(points),
            static_cast<int>(net.in)};
  }
  Rows delta_of(int64_t l, int64_t start) const {
    const int64_t points = count(start);
    return l == net.depth - 1 ? end_rows(b.ends, start, points)
                              : layer_rows(b.slopes[l], net.width, points);
  }

  void align_weights(const Pass& pass) {
    for (int plane = 0; plane < cut.planes && !error; ++plane) {
      const int64_t stride = plane ? pass.v_stride : pass.params_stride,
                    sets = sets_of(job, plane, cut.tasks), size = sets * weights_at(net, net.depth);
      error = FM_LAUNCH(align, up_to(size, kThreads), 1, kThreads, 0, stream, net,
                        (plane ? pass.v : pass.params) + first * stride, stride, sets,
                        b.weights[plane]);
    }
  }
  Rows weights_of(const Pass& pass, const Layer& y, int64_t l) const {
    Rows rows = {{}, {}, y.in, static_cast<int>(y.out), static_cast<int>(y.in)};
    const int64_t size = weights_at(net, net.depth);
    for (int plane = 0; plane < cut.planes; ++plane) {
      const int64_t stride = plane ? pass.v_stride : pass.params_stride;
      if (y.bare) {
        rows.at[plane] = (plane ? pass.v : pass.params) + first * stride;
        rows.task[plane] = stride;
      } else {
        rows.at[plane] = b.weights[plane] + weights_at(net, l);
        rows.task[plane] = sets_of(job, plane, cut.tasks) > 1 ? size : 0;
        rows.row = row_of(y.in);
      }
    }
    return rows;
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
      p.b = weights_of(pass, y, l);
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
        leave_rows(p, layer_rows(b.h[l], net.width, count(start)));
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
    if (!is_given(job)) return leave_rows(p, end_rows(b.y, start, 0));
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
      p.b = weights_of(pass, y, l);
      const int64_t points = count(start);
      if (l) {
        const Rows to = delta_of(l - 1, start);
        leave_rows(p, to);
        for (int i = 0; i < 2; ++i) p.slopes[i] = p.to[i];
        p.slopes_task = to.task[0];
      } else if (net.encoded) {
        leave_rows(p, layer_rows(b.below, net.encoded, points));
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
