// The Python module _C: planning, and how the library was built. Tensors go through torch.ops.
#include <dilated/build.h>
#include <dilated/pattern.h>
#include <dilated/planned_patterns.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
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

/// parts: address and number of the words of each, which the caller keeps alive.
PatternWords join_words(const PatternSpec& spec,
                        const std::vector<std::pair<uintptr_t, int64_t>>& parts) {
  const PatternSpec own = spec;
  const py::gil_scoped_release released;
  std::vector<const int32_t*> words;
  for (const auto& [address, size] : parts) {
    words.push_back(reinterpret_cast<const int32_t*>(address));
    if (!is_planned(words.back(), size)) {
      throw std::invalid_argument(
          "parts: must hold the words that plan() made, unchanged, got others");
    }
  }
  return {join_sequences(own, words)};
}

std::vector<PatternWords> plan_all_lengths(const PatternSpec& spec,
                                           const std::vector<int64_t>& lengths) {
  const PatternSpec own = spec;
  const py::gil_scoped_release released;
  std::vector<PatternWords> all;
  for (std::vector<int32_t>& words : plan_lengths(own, lengths, run_signal_handlers)) {
    all.push_back({std::move(words)});
  }
  return all;
}

PatternWords plan_words(const PatternSpec& spec) { return {plan(spec, run_signal_handlers)}; }

std::map<std::string, int64_t> report_numbers(const PatternSpec& spec) {
  const PatternReport numbers = report(spec, plan(spec, run_signal_handlers), run_signal_handlers);
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

/// Planning a long sequence takes milliseconds, in which other Python threads go on; they may
/// change the specification, so the function gets a copy.
template <auto function>
auto without_gil(const PatternSpec& spec) {
  const auto run = [own = spec] { return function(own); };
  const py::gil_scoped_release released;
  return run();
}

/// Stretches of positions, [(begin, end), ...], as a field of the class.
template <std::vector<Range> PatternSpec::* stretches>
void define_stretches(py::class_<PatternSpec>& spec, const char* name) {
  using Pairs = std::vector<std::pair<int64_t, int64_t>>;
  spec.def_property(
      name,
      [](const PatternSpec& self) {
        Pairs pairs;
        for (const auto& [begin, end] : self.*stretches) {
          pairs.emplace_back(begin, end);
        }
        return pairs;
      },
      [](PatternSpec& self, const Pairs& pairs) {
        (self.*stretches).clear();
        for (const auto& [begin, end] : pairs) {
          (self.*stretches).push_back({begin, end});
        }
      });
}

/// As int64 numbers in memory, so that a long list costs little.
void set_sequences(PatternSpec& spec, const std::optional<std::string_view>& numbers) {
  spec.sequences.reset();
  if (numbers.has_value()) {
    auto& sequences = spec.sequences.emplace(numbers->size() / sizeof(Sequence));
    std::memcpy(sequences.data(), numbers->data(), sequences.size() * sizeof(Sequence));
  }
}

std::optional<std::vector<std::pair<int64_t, int64_t>>> get_sequences(const PatternSpec& spec) {
  std::optional<std::vector<std::pair<int64_t, int64_t>>> pairs;
  if (spec.sequences.has_value()) {
    pairs.emplace();
    for (const auto& [first, length] : *spec.sequences) {
      pairs->emplace_back(first, length);
    }
  }
  return pairs;
}

PatternSpec make_spec(const py::kwargs& fields) {
  PatternSpec spec;
  const py::object view = py::cast(spec, py::return_value_policy::reference);
  for (const auto& [name, value] : fields) {
    py::setattr(view, name, value);
  }
  return spec;
}

void define_spec(py::module_& module) {
  py::enum_<Padding>(module, "Padding")
      .value("masked", Padding::kMasked)
      .value("zeros", Padding::kZeros);
  py::enum_<Directions>(module, "Directions")
      .value("forward", Directions::kForward)
      .value("transposed", Directions::kTransposed)
      .value("both", Directions::kBoth);
  py::enum_<QueryRows>(module, "QueryRows")
      .value("all", QueryRows::kAll)
      .value("near", QueryRows::kNear)
      .value("far", QueryRows::kFar);
  py::class_<Branch>(module, "Branch")
      .def(py::init<int64_t, int64_t, std::vector<int64_t>>(), py::arg("segment_length"),
           py::arg("dilation_rate"), py::arg("head_offsets") = std::vector<int64_t>{})
      .def_readwrite("segment_length", &Branch::segment_length)
      .def_readwrite("dilation_rate", &Branch::dilation_rate)
      .def_readwrite("head_offsets", &Branch::head_offsets);
  py::class_<PatternSpec> spec(module, "PatternSpec", "Everything that a pattern depends on.");
  spec.def(py::init(&make_spec), "From fields by name.")
      .def_readwrite("seq_len", &PatternSpec::seq_len)
      .def_readwrite("branches", &PatternSpec::branches)
      .def_readwrite("heads", &PatternSpec::heads)
      .def_readwrite("kv_heads", &PatternSpec::kv_heads)
      .def_readwrite("is_causal", &PatternSpec::is_causal)
      .def_readwrite("padding", &PatternSpec::padding)
      .def_readwrite("row_tile", &PatternSpec::row_tile)
      .def_readwrite("directions", &PatternSpec::directions)
      .def_readwrite("rows", &PatternSpec::rows)
      .def_property("sequences", &get_sequences, &set_sequences);
  define_stretches<&PatternSpec::queries>(spec, "queries");
  define_stretches<&PatternSpec::keys>(spec, "keys");
  define_stretches<&PatternSpec::far_keys>(spec, "far_keys");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The planner of libdilated, and how it was built.";

  py::class_<PatternWords>(module, "PatternWords", py::buffer_protocol(),
                           "A planned pattern: a buffer of int32 (pattern_layout.h).")
      .def_buffer(&PatternWords::buffer)
      .def("__len__", [](const PatternWords& self) { return self.words.size(); });

  define_spec(module);
  module.attr("TILES") = std::vector{std::pair(kRowTile, column_tile(kRowTile)),
                                     std::pair(kShortRowTile, column_tile(kShortRowTile))};
  module.def("validate", &validate, py::arg("spec"),
             "Checks the fields. ValueError names the one that is wrong.");
  module.def("is_whole", &is_whole, py::arg("spec"),
             "Whether queries and keys are the whole sequence, or batch.");
  module.def("plan", &without_gil<plan_words>, py::arg("spec"),
             "Plans a pattern. ValueError names the argument that can't be planned.");
  module.def("plan_lengths", &plan_all_lengths, py::arg("spec"), py::arg("lengths"),
             "Plans one sequence of each length, on several threads.");
  module.def("join_sequences", &join_words, py::arg("spec"), py::arg("parts"),
             "Joins a batch's pattern of its lengths', given as (address, number) of their words.");
  module.def("report", &without_gil<report_numbers>, py::arg("spec"),
             "Plans, and counts pairs, tiles and bytes (PatternReport in pattern.h).");
  module.def("interleaved_offsets", &interleaved_offsets, py::arg("dilation_rate"),
             py::arg("heads"), "The paper's head offsets in a branch, [heads].");
  module.def("blocked_offsets", &blocked_offsets, py::arg("dilation_rate"), py::arg("heads"),
             "torchscale's head offsets in a branch, [heads].");
  module.def("max_pattern_bytes", &max_pattern_bytes, "The most bytes that a pattern may take.");
  module.def("set_max_pattern_bytes", &set_max_pattern_bytes, py::arg("nbytes"),
             "Sets it, for the whole process.");
  module.def("planned_pattern_counts", &planned_counts,
             "What the operators keep for calls without a pattern (PlannedPatternCounts).");
  module.def("resize_planned_patterns", &resize_planned_patterns, py::arg("max_entries"),
             py::arg("max_bytes"), py::call_guard<py::gil_scoped_release>(),
             "Bounds what they keep. ValueError for a number below 0.");
  module.def("clear_planned_patterns", &clear_planned_patterns,
             py::call_guard<py::gil_scoped_release>(), "Drops all but what graphs captured.");
  module.def("built_with_cuda", &built_with_cuda);
  module.def("torch_version_built", &torch_version_built);
  module.def("cpu_instruction_set", &cpu_instruction_set);
}

}  // namespace dilated
