// The Python module _C: planning, and how the library was built. Tensors go through torch.ops.
#include <dilated/build.h>
#include <dilated/pattern.h>
#include <dilated/planned_patterns.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace dilated {
namespace {

/// A planned pattern. Python reads the words in place, through the buffer protocol.
struct PatternWords {
  std::vector<int32_t> words;

  // Writable, since torch.frombuffer warns about buffers that aren't.
  py::buffer_info buffer() { return {words.data(), static_cast<py::ssize_t>(words.size())}; }
};

/// Lets Python's signal handlers run, Ctrl-C's among them, and throws what they raise.
void run_signal_handlers() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) {
    throw py::error_already_set();
  }
}

PatternWords plan_words(const PatternSpec& spec) { return {plan(spec, run_signal_handlers)}; }

std::map<std::string, int64_t> report_numbers(const PatternSpec& spec) {
  const PatternReport numbers = report(spec, plan(spec, run_signal_handlers));
  return {{"nominal", numbers.nominal},   {"distinct", numbers.distinct},
          {"computed", numbers.computed}, {"bytes", numbers.bytes},
          {"tiles", numbers.tiles},       {"groups", numbers.groups},
          {"runs", numbers.runs}};
}

std::map<std::string, int64_t> planned_counts() {
  const PlannedPatternCounts counts = planned_pattern_counts();
  return {{"entries", counts.entries},
          {"bytes", counts.bytes},
          {"pinned_entries", counts.pinned_entries},
          {"pinned_bytes", counts.pinned_bytes},
          {"hits", counts.hits},
          {"misses", counts.misses},
          {"evictions", counts.evictions}};
}

/// function(PatternSpec) as a function of the specification's fields.
template <auto function>
auto with_fields(int64_t seq_len, std::vector<int64_t> segment_lengths,
                 std::vector<int64_t> dilation_rates, std::vector<int64_t> head_offsets,
                 int64_t heads, int64_t kv_heads, bool is_causal, bool zero_padding,
                 int64_t query_begin, int64_t query_end, int64_t key_begin, int64_t key_end,
                 int64_t row_tile) {
  return function({.seq_len = seq_len,
                   .segment_lengths = std::move(segment_lengths),
                   .dilation_rates = std::move(dilation_rates),
                   .head_offsets = std::move(head_offsets),
                   .heads = heads,
                   .kv_heads = kv_heads,
                   .is_causal = is_causal,
                   .padding = zero_padding ? Padding::kZeros : Padding::kMasked,
                   .queries = {query_begin, query_end},
                   .keys = {key_begin, key_end},
                   .row_tile = row_tile});
}

template <auto function>
void define(py::module_& module, const char* name, const char* doc) {
  // Planning a long sequence takes milliseconds, in which other Python threads go on.
  module.def(name, &with_fields<function>, py::call_guard<py::gil_scoped_release>(), doc,
             py::arg("seq_len"), py::arg("segment_lengths"), py::arg("dilation_rates"),
             py::arg("head_offsets"), py::arg("heads"), py::arg("kv_heads"), py::arg("is_causal"),
             py::arg("zero_padding"), py::arg("query_begin"), py::arg("query_end"),
             py::arg("key_begin"), py::arg("key_end"), py::arg("row_tile"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The planner of libdilated, and how it was built.";

  py::class_<PatternWords>(module, "PatternWords", py::buffer_protocol(),
                           "A planned pattern: a buffer of int32 (pattern_layout.h).")
      .def_buffer(&PatternWords::buffer)
      .def("__len__", [](const PatternWords& self) { return self.words.size(); });

  define<plan_words>(module, "plan",
                     "Plans a pattern. ValueError names the argument that can't be planned.");
  define<report_numbers>(module, "report",
                         "Plans, and counts pairs, tiles and bytes (PatternReport in pattern.h).");
  module.def("interleaved_offsets", &interleaved_offsets, py::arg("dilation_rates"),
             py::arg("heads"), "The paper's head offsets, [branches * heads].");
  module.def("blocked_offsets", &blocked_offsets, py::arg("dilation_rates"), py::arg("heads"),
             "torchscale's head offsets, [branches * heads].");
  module.def("max_pattern_bytes", &max_pattern_bytes, "The most bytes that a pattern may take.");
  module.def("set_max_pattern_bytes", &set_max_pattern_bytes, py::arg("nbytes"),
             "Sets it, for the whole process.");
  module.def("planned_pattern_counts", &planned_counts,
             "What the operators keep for calls without a pattern (PlannedPatternCounts).");
  module.def("resize_planned_patterns", &resize_planned_patterns, py::arg("max_entries"),
             py::arg("max_bytes"), py::call_guard<py::gil_scoped_release>(),
             "Bounds it. ValueError for a number below 0.");
  module.def("clear_planned_patterns", &clear_planned_patterns,
             py::call_guard<py::gil_scoped_release>(), "Drops all but what graphs captured.");
  module.def("built_with_cuda", &built_with_cuda);
  module.def("torch_version_built", &torch_version_built);
}

}  // namespace dilated
