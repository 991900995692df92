#include "kernels/cuda/choose.h"

#include <algorithm>
#include <charconv>
#include <numeric>
#include <ranges>
#include <system_error>

#include "kernels/cuda/hopper/shapes.h"
#include "kernels/cuda/portable/shapes.h"
#include "kernels/cuda/scalar/shapes.h"

namespace dilated::kernels::cuda {
namespace {

/// The first tile of a list, in order of width, that holds head_dim.
template <typename Tiles>
const auto& narrowest(const Tiles& tiles, int64_t head_dim) {
  return *std::ranges::find_if(tiles, [&](const auto& tile) { return head_dim <= tile.width; });
}

ForwardChoice scalar_forward(const Problem& problem) {
  const auto& tile = narrowest(scalar::kForwardTiles, problem.head_dim);
  return {.family = Family::kScalar,
          .width = tile.width,
          .row_tile = problem.row_tile,
          .tile = {tile.rows(), tile.keys()},
          .stages = 1,
          .shared_bytes = tile.bytes(),
          .max_blocks = 0,
          .has_counter = false,
          .strides = {}};
}

/// Whether the pattern's groups are short, and the list of tiles for such holds head_dim.
template <typename Tiles>
bool takes_short(const Problem& problem, const Tiles& tiles) {
  return problem.dtype != Dtype::kFloat32 && problem.row_tile == kShortRowTile &&
         problem.head_dim <= std::ranges::rbegin(tiles)->width;
}

/// The tile that measured best: 128 rows halve what is read from L2; a causal tile of 64 wastes
/// less above the diagonal.
ForwardChoice portable_forward(const Problem& problem) {
  const bool is_short = takes_short(problem, portable::kShortForwardTiles);
  portable::ForwardTile tile = is_short ? narrowest(portable::kShortForwardTiles, problem.head_dim)
                                        : narrowest(portable::kForwardTiles, problem.head_dim);
  if (tile.width == 64 && !is_short) {
    tile.rows = problem.is_causal ? 64 : 128;
  }
  return {.family = Family::kPortable,
          .width = tile.width,
          .row_tile = problem.row_tile,
          .tile = {tile.rows, tile.keys()},
          .stages = portable::ForwardTile::kStages,
          .shared_bytes = tile.bytes(),
          .max_blocks = 0,
          .has_counter = false,
          .strides = {}};
}

/// Strides of runs are divisors of the rates' least common multiple. None if they are too many.
ListStrides list_strides(std::span<const int64_t> dilation_rates) {
  constexpr int64_t kMostPeriod = ListStrides::kLongest;
  int64_t period = 1;
  for (const int64_t rate : dilation_rates) {
    period = rate > kMostPeriod ? kMostPeriod + 1 : std::lcm(period, rate);
    if (period > kMostPeriod) {
      return {};
    }
  }
  ListStrides strides{};
  const auto add = [&](int64_t stride) {
    if (strides.count < ListStrides::kMost) {
      strides.stride[strides.count] = static_cast<int32_t>(stride);
    }
    ++strides.count;
  };
  for (int64_t stride = 1; stride * stride <= period; ++stride) {
    if (period % stride == 0) {
      add(stride);
      if (stride * stride < period) {
        add(period / stride);
      }
    }
  }
  if (strides.count > ListStrides::kMost) {
    return {};
  }
  std::sort(strides.stride, strides.stride + strides.count);
  return strides;
}

/// Nothing where these kernels can't run the call.
std::optional<ForwardChoice> hopper_forward(const ForwardProblem& problem, const Device& device) {
  const bool has_width = problem.head_dim <= std::ranges::rbegin(hopper::kForwardTiles)->width;
  if (!device.has_hopper || !has_width || !problem.is_mappable ||
      takes_short(problem, portable::kShortForwardTiles)) {
    return std::nullopt;
  }
  const hopper::ForwardTile& tile = narrowest(hopper::kForwardTiles, problem.head_dim);
  if (tile.bytes() > device.shared_bytes) {
    return std::nullopt;
  }
  const ListStrides strides = list_strides(problem.dilation_rates);
  const int32_t maps = strides.count * (problem.has_far_keys ? 2 : 1);
  if (maps == 0 || maps > ListStrides::kMost) {
    return std::nullopt;
  }
  constexpr int64_t kRows = hopper::ForwardTile::kRows;
  return ForwardChoice{.family = Family::kHopper,
                       .width = tile.width,
                       .row_tile = problem.row_tile,
                       .tile = {hopper::ForwardTile::kRows, tile.keys()},
                       .stages = tile.key_stages(),
                       .shared_bytes = tile.bytes(),
                       .max_blocks = device.multiprocessors,
                       .has_counter = problem.rows > kRows * device.multiprocessors,
                       .strides = strides};
}

/// The same for the backward; rows are added up in an order of their own, so a deterministic one is
/// the portable kernels'.
std::optional<BackwardChoice> hopper_backward(const BackwardProblem& problem,
                                              const Device& device) {
  const bool has_width = problem.head_dim <= std::ranges::rbegin(hopper::kBackwardTiles)->width;
  if (!device.has_hopper || !has_width || !problem.is_mappable || problem.is_deterministic ||
      takes_short(problem, portable::kShortBackwardTiles)) {
    return std::nullopt;
  }
  const hopper::BackwardTile& tile = narrowest(hopper::kBackwardTiles, problem.head_dim);
  const ListStrides strides = list_strides(problem.dilation_rates);
  if (tile.bytes() > device.shared_bytes || strides.count == 0) {
    return std::nullopt;
  }
  return BackwardChoice{.family = Family::kHopper,
                        .width = tile.width,
                        .row_tile = problem.row_tile,
                        .tile = {hopper::BackwardTile::kRows, tile.columns()},
                        .stages = hopper::BackwardTile::kStages,
                        .shared_bytes = tile.bytes(),
                        .max_blocks = device.multiprocessors,
                        .sums_width = static_cast<int32_t>(query_sums_width(problem.head_dim)),
                        .strides = strides};
}

BackwardChoice scalar_backward(const Problem& problem) {
  const auto& tile = narrowest(scalar::kBackwardTiles, problem.head_dim);
  return {.family = Family::kScalar,
          .width = tile.width,
          .row_tile = problem.row_tile,
          .tile = {tile.rows(), scalar::BackwardTile::kColumns},
          .stages = 1,
          .shared_bytes = tile.bytes(),
          .max_blocks = 0,
          .sums_width = 0,
          .strides = {}};
}

/// Two stages where they fit. If tile.blocks() blocks fit a multiprocessor with one stage, they
/// must fit with two. A multiprocessor has 1 KiB more than its largest block, and reserves 1 KiB a
/// block.
int32_t count_stages(const portable::BackwardTile& tile, size_t shared_bytes) {
  constexpr size_t kReserved = 1024;
  const auto have_room = [&](int32_t stages, int32_t blocks) {
    return blocks * (tile.bytes(stages) + kReserved) <= shared_bytes + kReserved;
  };
  const int32_t blocks = have_room(1, tile.blocks()) ? tile.blocks() : 1;
  return have_room(2, blocks) ? 2 : 1;
}

/// Of a tile that fits.
BackwardChoice portable_backward(const BackwardProblem& problem, const Device& device,
                                 const portable::BackwardTile& tile) {
  const int32_t stages = count_stages(tile, device.shared_bytes);
  const auto sums_width = static_cast<int32_t>(query_sums_width(problem.head_dim));
  return {.family = Family::kPortable,
          .width = tile.width,
          .row_tile = problem.row_tile,
          .tile = {tile.keys, tile.queries()},
          .stages = stages,
          .shared_bytes = tile.bytes(stages),
          .max_blocks = device.multiprocessors * tile.blocks(),
          .sums_width = problem.is_deterministic ? 0 : sums_width,
          .strides = {}};
}

}  // namespace

ForwardChoice choose_forward(const ForwardProblem& problem, const Device& device) {
  if (problem.dtype == Dtype::kFloat32) {
    return scalar_forward(problem);
  }
  return hopper_forward(problem, device).value_or(portable_forward(problem));
}

BackwardChoice choose_backward(const BackwardProblem& problem, const Device& device) {
  if (problem.dtype == Dtype::kFloat32) {
    return scalar_backward(problem);
  }
  if (const auto choice = hopper_backward(problem, device); choice.has_value()) {
    return *choice;
  }
  if (takes_short(problem, portable::kShortBackwardTiles)) {
    return portable_backward(problem, device,
                             narrowest(portable::kShortBackwardTiles, problem.head_dim));
  }
  const int32_t width = narrowest(portable::kBackwardTiles, problem.head_dim).width;
  for (const portable::BackwardTile& tile : portable::kBackwardTiles) {
    if (tile.width == width && tile.bytes(1) <= device.shared_bytes) {
      return portable_backward(problem, device, tile);
    }
  }
  return scalar_backward(problem);
}

std::optional<size_t> parse_shared_bytes(std::string_view text) {
  size_t bytes = 0;
  const auto [last, error] = std::from_chars(text.begin(), text.end(), bytes);
  const bool is_number = error == std::errc() && last == text.end();
  return is_number && bytes >= kLeastSharedBytes ? std::optional(bytes) : std::nullopt;
}

}  // namespace dilated::kernels::cuda
