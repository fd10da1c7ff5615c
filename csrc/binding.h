// The structs of abi.h as Python classes of a module, pointers as integers, and the lists of names.
//
// module_local: the modules of two workers hold the same structs side by side.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "abi.h"

namespace fastmeta {

namespace py = pybind11;

template <class C, class P>
void pointer(py::class_<C>& c, const char* name, P* C::*field) {
  c.def_property(
      name, [field](const C& x) { return reinterpret_cast<uintptr_t>(x.*field); },
      [field](C& x, uintptr_t p) { x.*field = reinterpret_cast<P*>(p); });
}

template <class C, class E>
void number(py::class_<C>& c, const char* name, E C::*field) {
  c.def_property(
      name, [field](const C& x) { return static_cast<int>(x.*field); },
      [field](C& x, int v) { x.*field = static_cast<E>(v); });
}

template <class C>
void triple(py::class_<C>& c, const char* name, int64_t (C::*field)[3]) {
  c.def_property(
      name,
      [field](const C& x) { return py::make_tuple((x.*field)[0], (x.*field)[1], (x.*field)[2]); },
      [field](C& x, const py::tuple& v) {
        for (size_t i = 0; i < 3; ++i) (x.*field)[i] = v[i].cast<int64_t>();
      });
}
// with_job gives each class of jobs what runs them.
template <class F>
void bind_structs(py::module_& m, F&& with_job) {
#define FM_TEXT(name) #name,
  const auto list = [](std::initializer_list<const char*> names) {
    py::list all;
    for (const char* name : names) all.append(name);
    return py::tuple(all);
  };
  m.attr("ACTIVATIONS") = list({FM_ACTIVATIONS(FM_TEXT)});
  m.attr("OUTPUTS") = list({FM_OUTPUTS(FM_TEXT)});
  m.attr("LOSSES") = list({FM_LOSSES(FM_TEXT)});
  m.attr("MEASURES") = list({FM_MEASURES(FM_TEXT)});
  m.attr("RULES") = list({FM_RULES(FM_TEXT)});
  m.attr("OPS") = list({FM_OPS(FM_TEXT)});
  m.attr("MAX_DEPTH") = kMaxDepth;

#define FM_FIELD(name) c.def_readwrite(#name, &C::name)
#define FM_POINTER(name) pointer(c, #name, &C::name)
#define FM_ENUM(name) number(c, #name, &C::name)
  {
    using C = Network;
    py::class_<C> c(m, "Network", py::module_local());
    c.def(py::init<>());
    FM_FIELD(in), FM_FIELD(out), FM_FIELD(width), FM_FIELD(depth), FM_ENUM(activation),
        FM_ENUM(output);
    FM_FIELD(w0), FM_FIELD(w0_first), FM_FIELD(shift), FM_FIELD(encoded), FM_FIELD(identity);
    FM_POINTER(basis), FM_POINTER(phase);
  }
  {
    using C = March;
    py::class_<C> c(m, "March", py::module_local());
    c.def(py::init<>());
    FM_FIELD(samples), FM_FIELD(last_interval), FM_FIELD(white), FM_FIELD(softplus);
  }
  {
    using C = Data;
    py::class_<C> c(m, "Data", py::module_local());
    c.def(py::init<>());
    FM_FIELD(tasks), FM_FIELD(points), FM_FIELD(per_step), FM_POINTER(x), FM_FIELD(x_stride),
        FM_POINTER(y);
    FM_POINTER(counts), FM_POINTER(seed), FM_ENUM(loss), FM_FIELD(clamp), FM_ENUM(measure),
        FM_FIELD(march);
    FM_POINTER(origins), FM_POINTER(directions), FM_POINTER(near), FM_POINTER(far),
        FM_POINTER(pixels);
    FM_FIELD(angles), FM_FIELD(size), FM_POINTER(order), FM_POINTER(starts);
  }
  {
    using C = Rule;
    py::class_<C> c(m, "Rule", py::module_local());
    c.def(py::init<>());
    FM_ENUM(kind), FM_FIELD(nesterov), FM_FIELD(mu), FM_FIELD(weight_decay);
    FM_FIELD(beta1), FM_FIELD(beta2), FM_FIELD(eps);
  }
  {
    using C = Job;
    py::class_<C> c(m, "Job", py::module_local());
    c.def(py::init<>());
    FM_ENUM(op), FM_FIELD(threads), FM_FIELD(net), FM_FIELD(data), FM_FIELD(query);
    FM_POINTER(params), FM_FIELD(params_stride), FM_POINTER(v), FM_FIELD(v_stride), FM_POINTER(w),
        FM_FIELD(w_stride);
    FM_POINTER(gy), FM_FIELD(step), FM_POINTER(y), FM_POINTER(loss), FM_POINTER(grad),
        FM_POINTER(hv), FM_POINTER(gx);
    FM_FIELD(steps), FM_FIELD(rule), FM_POINTER(lr), FM_POINTER(theta), FM_POINTER(thetas),
        FM_FIELD(order);
    FM_POINTER(rates), FM_FIELD(budget);
    triple(c, "lr_stride", &C::lr_stride);
    triple(c, "rates_size", &C::rates_size);
    with_job(c);
  }
  {
    using C = CompositeJob;
    py::class_<C> c(m, "CompositeJob", py::module_local());
    c.def(py::init<>());
    FM_FIELD(march), FM_FIELD(threads), FM_FIELD(rays), FM_POINTER(raw), FM_POINTER(t),
        FM_POINTER(vraw);
    FM_POINTER(vt), FM_POINTER(grgb), FM_POINTER(gdepth), FM_POINTER(gacc), FM_POINTER(rgb),
        FM_POINTER(depth);
    FM_POINTER(acc), FM_POINTER(graw), FM_POINTER(gt);
    with_job(c);
  }
  {
    using C = ProjectJob;
    py::class_<C> c(m, "ProjectJob", py::module_local());
    c.def(py::init<>());
    FM_FIELD(threads), FM_FIELD(tasks), FM_FIELD(angles), FM_FIELD(size), FM_POINTER(pixels),
        FM_POINTER(order), FM_POINTER(starts), FM_POINTER(from);
    FM_POINTER(to), FM_FIELD(adjoint);
    with_job(c);
  }
}

}  // namespace fastmeta
