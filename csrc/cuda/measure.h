// What stands between a network's outputs and the loss of its task: the points that it is asked at,
// and from its outputs the loss and their adjoint. The kernels are in measure.cu, compiled once:
// float32 whatever the arithmetic of the hidden layers.
#pragma once

#include "../abi.h"

namespace fastmeta {

// Tasks first to first + tasks of a batch, at a step's draw.
struct Chunk {
  const Data* data;
  int64_t step, first, tasks;
};

// M, the network's points of a task: its points, or pixels, or the samples of its rays.
int64_t network_points(const Data& data);

// Floats of working memory, which lay_points and measure_loss of a chunk share.
int64_t measure_room(const Data& data, int64_t tasks, bool dual);

// x [tasks, M, D]: points, drawn or all, pixels as given, samples o + t d of rays. Rows beyond a
// task's count are 0. Returns the CUDA error.
int lay_points(const Network& net, const Chunk& chunk, float* x, float* room, void* stream);

// y [planes, tasks, M, C], the network's outputs and, dual, their tangents. loss [tasks], where it
// is not null: the mean over a task's own numbers. If back, y becomes its adjoint (of the loss, and
// the adjoint's tangent), 0 in rows beyond a task's count. Returns the CUDA error.
int measure_loss(const Network& net, const Chunk& chunk, bool dual, bool back, float* y,
                 float* loss, float* room, void* stream);

// The ops alone, on float32: composite or its adjoint, plain or along tangents; project or its
// adjoint. room: floats of working memory.
int64_t room_of(const CompositeJob& job);
int64_t room_of(const ProjectJob& job);
int run(const CompositeJob& job, float* room, void* stream);
int run(const ProjectJob& job, float* room, void* stream);

}  // namespace fastmeta
