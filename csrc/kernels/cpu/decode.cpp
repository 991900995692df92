// Decoding on the CPU: a query of a head is a task, which meets every row once.
#include "kernels/cpu/decode.h"

#include <ATen/Parallel.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/cpu/half.h"

namespace dilated::kernels::cpu {
namespace {

using baseline::BFloat16, baseline::Compute, baseline::Half, baseline::narrow, baseline::widen;

constexpr int64_t kLanes = 8;  // sums side by side, which compilers make vectors of

template <typename Element>
Compute<Element> dot(const Compute<Element>* query, const Element* key, int64_t size) {
  Compute<Element> sums[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += query[d + lane] * widen(key[d + lane]);
    }
  }
  Compute<Element> sum = 0;
  for (; d < size; ++d) {
    sum += query[d] * widen(key[d]);
  }
  for (const auto one : sums) {
    sum += one;
  }
  return sum;
}

/// The softmax of one query so far.
template <typename Scalar>
struct Running {
  std::vector<Scalar> query, sums;
  Scalar max = -std::numeric_limits<Scalar>::infinity(), denominator = 0;

  template <typename Element>
  void add(const Element* key, const Element* value, int64_t multiplicity) {
    const auto size = static_cast<int64_t>(query.size());
    Scalar score = dot(query.data(), key, size);
    score += multiplicity > 1 ? std::log(static_cast<Scalar>(multiplicity)) : Scalar{0};
    if (score > max) {
      const Scalar factor = std::exp(max - score);
      for (Scalar& sum : sums) {
        sum *= factor;
      }
      denominator *= factor;
      max = score;
    }
    const Scalar weight = std::exp(score - max);
    denominator += weight;
    for (int64_t d = 0; d < size; ++d) {
      sums[static_cast<size_t>(d)] += weight * widen(value[d]);
    }
  }
};

/// What a head's query meets: rows of each branch, and the branches whose lattices nest in it and
/// hold the query too, a bit each.
struct Meetings {
  LatticeRows rows[kMostBranches];
  uint32_t outer[kMostBranches];
  Divisor steps[kMostBranches][kMostBranches];  // of an outer lattice within an inner one
};

Meetings meetings_of(const DecodeAttendArgs& args, int64_t head, int64_t position) {
  Meetings meetings{};
  for (int32_t branch = 0; branch < args.branches; ++branch) {
    const Lattice& lattice = args.lattices[branch * args.heads + head];
    meetings.rows[branch] = rows_met(args, args.forgets, branch, lattice, position);
    if (meetings.rows[branch].step == 0) {
      continue;
    }
    for (int64_t inner = lattice.parent; inner >= 0;
         inner = args.lattices[inner * args.heads + head].parent) {
      meetings.outer[inner] |= uint32_t{1} << branch;
      meetings.steps[inner][branch] = make_divisor(
          static_cast<uint32_t>(args.dilation_rates[branch] / args.dilation_rates[inner]));
    }
  }
  return meetings;
}

int64_t multiplicity_of(const Meetings& meetings, int32_t branch, int64_t distance) {
  int64_t multiplicity = 1;
  for (uint32_t rest = meetings.outer[branch]; rest != 0; rest &= rest - 1) {
    const Divisor& step = meetings.steps[branch][std::countr_zero(rest)];
    multiplicity += step.divides(static_cast<uint32_t>(distance)) ? 1 : 0;
  }
  return multiplicity;
}

template <typename Element>
void attend_one(const DecodeAttendArgs& args, int64_t batch, int64_t index, int64_t head,
                Running<Compute<Element>>& running) {
  using Scalar = Compute<Element>;
  const int64_t count = count_of(args, batch), size = args.head_dim;
  const int64_t position = args.lengths[batch] - count + index;
  running = {std::move(running.query), std::move(running.sums)};
  running.sums.assign(static_cast<size_t>(size), Scalar{0});
  running.query.resize(static_cast<size_t>(size));
  for (int64_t d = 0; d < size; ++d) {
    running.query[static_cast<size_t>(d)] =
        widen(row_at<Element>(args.query, batch, index, head)[d]) * static_cast<Scalar>(args.scale);
  }
  if (index < count && position >= 0) {
    const int64_t kv_head = head / (args.heads / args.kv_heads);
    const Meetings meetings = meetings_of(args, head, position);
    for (int32_t branch = 0; branch < args.branches; ++branch) {
      const LatticeRows& rows = meetings.rows[branch];
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t row = rows.first + i * rows.step;
        running.add(row_at<Element>(args.key, batch, row, kv_head),
                    row_at<Element>(args.value, batch, row, kv_head),
                    multiplicity_of(meetings, branch, rows.distance - i));
      }
    }
  }
  const bool meets_any = running.denominator != 0;
  Element* out = row_at<Element>(args.out, batch, index, head);
  for (int64_t d = 0; d < size; ++d) {
    const Scalar sum = running.sums[static_cast<size_t>(d)];
    narrow(meets_any ? sum / running.denominator : Scalar{0}, out[d]);
  }
  static_cast<Scalar*>(args.lse)[(batch * args.heads + head) * args.queries + index] =
      meets_any ? running.max + std::log(running.denominator) : running.max;
}

template <typename Element>
void attend(const DecodeAttendArgs& args) {
  const int64_t tasks = args.batch * args.queries * args.heads;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Running<Compute<Element>> running;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t query = task / args.heads;
      attend_one<Element>(args, query / args.queries, query % args.queries, task % args.heads,
                          running);
    }
  });
}

/// One position's rows of one KV head and branch: each lattice's once.
void append_one(const DecodeAppendArgs& args, int32_t branch, int64_t batch, int64_t index,
                int64_t kv_head, int64_t last) {
  const int64_t group = args.heads / args.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t row = row_kept(args, branch, args.lattices[branch * args.heads + head],
                                 args.lengths[batch] + index, last);
    if (row < 0) {
      continue;
    }
    const auto copy = [&](const Rows& from, const MutableRows& to) {
      const auto at = [&](const auto& rows, int64_t offset) { return offset * rows.element_bytes; };
      std::memcpy(static_cast<char*>(to.data) + at(to, to.strides.offset(batch, row, 0)),
                  static_cast<const char*>(from.data) +
                      at(from, from.strides.offset(batch, index, kv_head)),
                  static_cast<size_t>(args.head_dim * from.element_bytes));
    };
    copy(args.key, args.key_rows);
    copy(args.value, args.value_rows);
    return;  // heads whose lattice holds the position agree in its offset
  }
}

}  // namespace

void decode_attend(const DecodeAttendArgs& args) {
  switch (args.dtype) {
    case Dtype::kFloat64:
      return attend<double>(args);
    case Dtype::kFloat32:
      return attend<float>(args);
    case Dtype::kBFloat16:
      return attend<BFloat16>(args);
    case Dtype::kFloat16:
      return attend<Half>(args);
  }
}

bool decode_append(const DecodeAppendArgs& args) {
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    if (args.lengths[batch] + count_of(args, batch) > args.max_seq_len) {
      return false;
    }
  }
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    const int64_t count = count_of(args, batch);
    const int64_t last = args.lengths[batch] + count - 1;
    for (int64_t index = 0; index < count; ++index) {
      for (int32_t branch = 0; branch < args.branches; ++branch) {
        for (int64_t kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
          append_one(args, branch, batch, index, kv_head, last);
        }
      }
    }
    args.lengths_after[batch] += count;
  }
  return true;
}

}  // namespace dilated::kernels::cpu
