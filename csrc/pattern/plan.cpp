// The planner: from branches and offsets to tile lists.
//
// The sequence is cut into *cells* at every branch's segment boundaries, so that all rows of a cell
// lie in the same segments. Within a cell a row's columns depend only on which branches it is in;
// rows in the same branches form a *group*. Where the boundaries around two cells look the same
// from inside, their groups are the same but for the origin and are stored once: with nested
// segments the table of groups does not grow with the sequence.
//
//   segments of branch 0    |-----|-----|-----|-----|-----|-----|-----|-----|
//   segments of branch 1    |-----------|-----------|-----------|-----------|
//   segments of branch 2    |-----------------------|-----------------------|
//   kinds of cells          |  a  |  b  |  c  |  d  |  a  |  b  |  c  |  d  |
//   spans                   |-----------------------|-----------------------|
#include "pattern/plan.h"

#include "pattern/budget.h"
#include "pattern/join.h"
#include "pattern/resolved.h"
#include "pattern/table.h"
#include "pattern/words.h"

namespace dilated {
namespace pattern {

std::vector<int32_t> plan_one(const PatternSpec& spec, const std::function<void()>& poll,
                              Scratch& scratch) {
  const ResolvedSpec resolved(spec);
  Budget budget(spec, poll);
  std::vector<int32_t> words = begin_words();
  Table forward{}, transposed{};
  const bool one_for_both = is_symmetric(spec);
  const bool is_transposed = asks_for(spec, Directions::kTransposed) && !one_for_both;
  if (asks_for(spec, Directions::kForward) || one_for_both) {
    forward = TablePlanner(resolved, /*transposed=*/false, budget, scratch)
                  .write(words, is_transposed ? 1 : 0);
  }
  if (is_transposed) {
    transposed = TablePlanner(resolved, /*transposed=*/true, budget, scratch).write(words, 0);
  } else if (one_for_both) {
    transposed = forward;
  }
  seal(spec, forward, transposed, words);
  return words;
}

}  // namespace pattern

std::vector<int32_t> plan(const PatternSpec& spec, const std::function<void()>& poll) {
  if (!spec.sequences.has_value() || !is_whole(spec)) {
    pattern::Scratch scratch;
    return pattern::plan_one(spec, poll, scratch);
  }
  pattern::Joiner joiner(spec);
  const std::vector<std::vector<int32_t>> parts = plan_lengths(spec, joiner.lengths(), poll);
  for (const std::vector<int32_t>& part : parts) {
    joiner.add(part.data());
  }
  return joiner.join();
}

}  // namespace dilated
